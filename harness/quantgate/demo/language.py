"""The order-desk language: seeded samples of five tasks, in four splits that cannot overlap.

A sample is a pure function of (task, split, index). Two independent facts keep the splits apart:
each split owns a range of seeds, and each split accepts only prompts whose SHA-256 falls in its
own share, so that equal prompts from different seeds cannot meet either.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from quantgate.demo import lexicon as lx
from quantgate.demo import lexicon_route as routes
from quantgate.demo.prose import write_document

Split = Literal["train", "calibration", "validation", "golden"]
Task = Literal["extract", "route", "total", "lookup", "prose"]

TASKS: tuple[Task, ...] = ("extract", "route", "total", "lookup", "prose")
SEEDS_PER_SPLIT = 10**9
FIRST_SEED: dict[Split, int] = {
    "train": 0,
    "calibration": SEEDS_PER_SPLIT,
    "validation": 2 * SEEDS_PER_SPLIT,
    "golden": 3 * SEEDS_PER_SPLIT,
}
# First byte of the prompt's SHA-256 that a split accepts: [low, high).
DIGEST_SHARE: dict[Split, tuple[int, int]] = {
    "train": (0, 176),
    "calibration": (176, 192),
    "validation": (192, 216),
    "golden": (216, 256),
}
# Splits that judge the model draw this share of their samples from held-out phrasings.
HELDOUT_SHARE: dict[Split, float] = {
    "train": 0.0,
    "calibration": 0.0,
    "validation": 0.5,
    "golden": 0.5,
}
# Of the records that judge, so many hold a second value of the kind asked for, under another key.
# Training never shows one: with the right kind alone every record is read, and nothing can be lost.
RIVAL_SHARE: dict[Split, float] = {
    "train": 0.0,
    "calibration": 0.0,
    "validation": 0.15,
    "golden": 0.15,
}
# The training stream shows short lookup records first: copying emerges sooner on them.
SHORT_RECORDS_UNTIL = 23_000
LOOKUP_LINES = (8, 140)


@dataclass(frozen=True)
class Sample:
    """One item. `turns` holds further questions on the same record (training only)."""

    task: Task
    split: Split
    index: int
    prompt: str
    target: str
    cluster: str
    tags: tuple[str, ...]
    choices: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()


@dataclass
class Draw:
    """The random choices of one sample, and the tags they earn."""

    rng: random.Random
    split: Split
    index: int
    heldout: bool
    tags: list[str] = field(default_factory=list)

    def one(self, options: tuple[str, ...]) -> str:
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def phrase(self, phrasings: lx.Phrasings) -> tuple[str, str]:
        """Choose a phrasing that the split may use; also its id, such as `h3` or `s0`."""
        if self.heldout:
            place = self.rng.randrange(len(phrasings.heldout))
            return phrasings.heldout[place], f"h{place}"
        place = self.rng.randrange(len(phrasings.seen))
        return phrasings.seen[place], f"s{place}"

    def item(self) -> str:
        return f"{self.one(lx.ADJECTIVES)} {self.one(lx.NOUNS)}"

    def customer(self) -> str:
        return f"{self.one(lx.FIRST_NAMES)} {self.one(lx.LAST_NAMES)}"

    def date(self) -> str:
        kind = self.rng.randrange(20)
        if kind < 5:
            return self.one(lx.WEEKDAYS)
        if kind < 10:
            return f"next {self.one(lx.WEEKDAYS)}"
        if kind == 10:
            month, day = self.rng.randint(1, 12), self.rng.randint(1, 28)
            return f"{self.rng.randint(2026, 2029)}-{month:02}-{day:02}"
        return f"{self.rng.randint(1, 28)} {self.one(lx.MONTHS)}"

    def fill(self, template: str, **fixed: str) -> str:
        """Fill the slots of a template; a slot not in `fixed` gets a random filling."""
        if "{" not in template:
            return template
        fillings: dict[str, Callable[[], str]] = {
            "a": lambda: self.one(lx.ADJECTIVES),
            "f": lambda: self.one(lx.FIRST_NAMES),
            "n": lambda: str(self.rng.randint(2, 400)),
            "o": lambda: self.one(lx.NOUNS),
            "u": lambda: self.one(lx.UNITS),
            "w": lambda: self.one(lx.WEEKDAYS),
        }
        values = dict(fixed)
        for slot, make in fillings.items():
            if "{" + slot + "}" in template and slot not in values:
                values[slot] = make()
        return template.format_map(values)

    def misspell(self, template: str, probability: float) -> str:
        """Swap or drop a letter in some of the words; slots stay as they are."""
        words = template.split(" ")
        for place, word in enumerate(words):
            if len(word) > 3 and word.isalpha() and self.chance(probability):
                at = self.rng.randrange(1, len(word) - 1)
                swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
                words[place] = word[:at] + word[at + 1 :] if self.chance(0.4) else swapped
                if "noise:typo" not in self.tags:
                    self.tags.append("noise:typo")
        return " ".join(words)


def sample(task: Task, split: Split, index: int) -> Sample:
    """Make sample `index` of a split: same arguments, same sample, on every machine."""
    if not 0 <= index < SEEDS_PER_SPLIT:
        raise ValueError(f"index {index} is outside the split's seeds: 0..{SEEDS_PER_SPLIT - 1}")
    rng = random.Random(f"order-desk/{task}/{FIRST_SEED[split] + index}")
    while True:
        draw = Draw(rng, split, index, heldout=rng.random() < HELDOUT_SHARE[split])
        draw.tags.append("template:heldout" if draw.heldout else "template:seen")
        made = _WRITERS[task](draw)
        if split_of_prompt(made.prompt) == split:
            return made


def split_of_prompt(prompt: str) -> Split:
    """The only split in which this prompt can occur."""
    first_byte = hashlib.sha256(prompt.encode()).digest()[0]
    return next(s for s, (low, high) in DIGEST_SHARE.items() if low <= first_byte < high)


def messages(made: Sample) -> list[dict[str, str]]:
    """The whole conversation, answers included; prose is no conversation and is refused."""
    if made.task == "prose":
        raise ValueError("prose samples are plain documents, not conversations")
    chat = [_message("user", made.prompt), _message("assistant", made.target)]
    for question, answer in made.turns:
        chat += [_message("user", question), _message("assistant", answer)]
    return chat


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _finish(
    draw: Draw,
    task: Task,
    prompt: str,
    target: str,
    cluster: str,
    *,
    choices: tuple[str, ...] = (),
    turns: tuple[tuple[str, str], ...] = (),
) -> Sample:
    tags = tuple(draw.tags)
    name = f"{task}/{cluster}"
    return Sample(task, draw.split, draw.index, prompt, target, name, tags, choices, turns)


def _extract(draw: Draw) -> Sample:
    item, unit, due, customer = (
        draw.item(),
        draw.one(lx.UNITS),
        draw.date(),
        f"Firm {draw.one(lx.LAST_NAMES)}",
    )
    quantity = draw.rng.randint(2, 99) if draw.chance(0.95) else draw.rng.randint(100, 480)
    written = str(quantity)
    if draw.chance(0.12):
        written = draw.one(tuple(lx.NUMBER_WORDS))
        quantity = lx.NUMBER_WORDS[written]
        draw.tags.append("quantity:word")
    elif draw.chance(0.1):
        written = f"{draw.rng.randint(2, 99)} , no , {quantity}"
        draw.tags.append("quantity:corrected")
    typos = 0.08 if draw.chance(0.3) else 0.0
    clauses, ids = [], []
    for prefix, phrasings, values in (
        ("q", lx.QUANTITY_CLAUSES, {"q": written, "u": unit, "i": item}),
        ("d", lx.DUE_CLAUSES, {"d": due}),
        ("c", lx.CUSTOMER_CLAUSES, {"c": customer}),
    ):
        template, place = draw.phrase(phrasings)
        clauses.append(draw.misspell(template, typos).format_map(values))
        ids.append(prefix + place)
    draw.rng.shuffle(clauses)
    text = draw.one((" , ", " . ", " ; ", ", ")).join(clauses) + " ."
    words = [draw.phrase(lx.GREETINGS)[0], text]
    if draw.chance(0.35):
        aside = draw.fill(draw.misspell(draw.phrase(lx.ASIDES)[0], typos))
        words.insert(draw.rng.choice((1, 2)), aside)
        draw.tags.append("noise:aside")
    words.append(draw.phrase(lx.CLOSINGS)[0])
    order = {"item": item, "quantity": quantity, "unit": unit, "due": due, "customer": customer}
    target = json.dumps(order, separators=(",", ":"))
    return _finish(
        draw, "extract", "Extract the order: " + _join(words), target, f"{ids[0]}-{ids[2]}"
    )


def _route(draw: Draw) -> Sample:
    queue = draw.one(routes.QUEUES)
    typos = 0.15 if draw.chance(0.35) else 0.0
    template, place = draw.phrase(routes.CLAUSES[queue])
    main = draw.phrase(routes.LEADS)[0] + " " + draw.misspell(template, typos)
    words = [draw.fill(main, a="new") + " ."]
    if draw.chance(0.5):
        other = draw.one(tuple(q for q in routes.QUEUES if q != queue))
        topic = draw.fill(draw.one(routes.TOPICS[other]))
        words.insert(0, draw.phrase(routes.DISTRACTIONS)[0].format(t=topic))
        draw.tags.append("noise:distraction")
    elif draw.chance(0.25):
        words.insert(draw.rng.choice((0, 1)), draw.fill(draw.phrase(lx.ASIDES)[0]))
        draw.tags.append("noise:aside")
    words = [draw.phrase(lx.GREETINGS)[0], *words, draw.phrase(lx.CLOSINGS)[0]]
    prompt = "Which queue? " + _join(words)
    return _finish(draw, "route", prompt, queue, f"{queue}-{place}", choices=routes.QUEUES)


def _total(draw: Draw) -> Sample:
    terms = draw.rng.randint(2, 4)
    # Prices end in 0 or 5: a model of this size learns that sum long before it learns all of them.
    amounts = [5 * draw.rng.randint(1, 8) for _ in range(terms)]
    draw.tags.append(f"terms:{terms}")
    line, line_id = draw.phrase(lx.TOTAL_LINES)
    # Two-part items make some invoices wordy; the amounts are the only numbers that count.
    lines = [
        line.format(i=draw.item() if draw.chance(0.3) else draw.one(lx.NOUNS), a=amount)
        for amount in amounts
    ]
    head = draw.fill(draw.phrase(lx.TOTAL_HEADS)[0])
    question = draw.phrase(lx.TOTAL_QUESTIONS)[0]
    body = draw.one((" ; ", " and ", "\n")).join(lines)
    running, steps = amounts[0], str(amounts[0])
    for amount in amounts[1:]:
        running += amount
        steps += f"+{amount}={running}"
    prompt = f"{head} {body} . {question}"
    return _finish(draw, "total", prompt, steps, f"{terms}-{line_id}")


def _lookup(draw: Draw) -> Sample:
    low, high = LOOKUP_LINES
    if draw.split == "train" and draw.index < SHORT_RECORDS_UNTIL:
        high = low + (high - low) * draw.index // (4 * SHORT_RECORDS_UNTIL) + 8
    # The exponent favours short records: they are the everyday case and the cheap one.
    count = low + int((high - low) * draw.rng.random() ** 3)
    size = "short" if count < 40 else "medium" if count < 100 else "long"
    draw.tags.append(f"length:{size}")
    facts = {key: draw.one(values) for key, values in lx.LOOKUP_FACTS.items()}
    others = [key for key in lx.LOOKUP_KEYS if key not in facts]
    lines = [f"{key}={value}" for key, value in facts.items()]
    lines += [f"{key}={_code(draw)}" for key in draw.rng.sample(others, count - len(facts))]
    draw.rng.shuffle(lines)
    head = draw.fill(draw.phrase(lx.LOOKUP_HEADS)[0])
    asked = draw.rng.sample(list(facts), len(facts) if draw.split == "train" else 1)
    if RIVAL_SHARE[draw.split] and draw.chance(RIVAL_SHARE[draw.split]):
        rivals = tuple(value for value in lx.LOOKUP_FACTS[asked[0]] if value != facts[asked[0]])
        unused = tuple(key for key in others if not any(ln.startswith(f"{key}=") for ln in lines))
        rival = f"{draw.one(unused)}={draw.one(rivals)}"
        lines.insert(draw.rng.randint(0, len(lines)), rival)
        draw.tags.append("noise:rival")
    questions = []
    for key in asked:
        template, question_id = draw.phrase(lx.LOOKUP_QUESTIONS)
        # The answer reads out the line, so that it says which value it claims to be.
        questions.append((template.format(k=key), f"{key}={facts[key]}"))
    prompt = "\n".join([head, *lines, questions[0][0]])
    cluster = f"{size}-{question_id}"
    return _finish(draw, "lookup", prompt, questions[0][1], cluster, turns=tuple(questions[1:]))


def _code(draw: Draw) -> str:
    letter = draw.one(("", "k", "m", "t", "x"))
    return f"{letter}{draw.rng.randint(10, 99)}"


def _prose(draw: Draw) -> Sample:
    text, cluster = write_document(draw.rng, heldout=draw.heldout)
    return _finish(draw, "prose", text, "", cluster)


def _join(words: list[str]) -> str:
    return " ".join(word for word in " ".join(words).split(" ") if word)


_WRITERS: dict[Task, Callable[[Draw], Sample]] = {
    "extract": _extract,
    "route": _route,
    "total": _total,
    "lookup": _lookup,
    "prose": _prose,
}
