"""Templated day reports of the order desk: the prose that perplexity and KL are measured on."""

import random

from quantgate.demo import lexicon as lx

PARAGRAPHS = lx.Phrasings(
    (
        "On {w} the desk opened at {h} and {f} took the first call .",
        "{c} asked for {n} {u} of {i} , and the desk noted the order at once .",
        "The warehouse had only {n} {u} of {i} left , so {f} called the maker .",
        "The courier came at {h} and took the parcel for {c} .",
        "By the end of {w} every order for {i} was packed .",
        "{f} checked the invoice of {c} and found no mistake .",
        "A customer sent the {o} back because the handle was broken .",
        "{c} wanted to know when the {i} would arrive , and {f} promised {w} .",
        "The delivery for {c} was late , since the driver had gone to the wrong address .",
        "At {h} the phone rang again , and it was {c} with a question about the {o} .",
        "{f} wrote down the date , the quantity and the unit , as the desk always does .",
        "The price of the {o} went up in {m} , which nobody at the desk liked .",
        "In {m} the desk sold more {o} than in any other month .",
        "Most of the {u} were full of {o} , but some held {i} .",
        "{c} paid the bill on the same day and thanked {f} for the help .",
        "The technician looked at the {o} and said that a part was missing .",
        "When the {i} were sold out , {c} took the {o} instead .",
        "{f} counted the {u} twice and wrote {n} on the card .",
        "Nobody could find the label , so the parcel stayed on the shelf until {w} .",
        "The new catalogue came in {m} with the {i} on the first page .",
        "It was a quiet morning , and {f} used it to clean the shelves .",
        "{c} called at {h} to cancel , but {f} had already sent the {u} .",
        "The refund for {c} left the bank on {w} .",
        "After lunch {f} and the driver carried the {o} to the door .",
    ),
    (
        "On {w} the first call came at {h} , and {c} wanted {i} .",
        "{f} found a mistake in the order of {c} and called back on the same day .",
        "Since the {o} were sold out in {m} , the desk sent {n} {u} of {i} instead .",
        "The driver had only {n} {u} in the van when {f} counted them .",
        "{c} sent back the {i} at once , because some of the {o} were missing .",
        "In {m} the maker said that the {i} would arrive on {w} .",
        "The parcel of {c} was on the wrong shelf , where nobody could find it .",
        "{f} promised to check the price of the {o} by {w} .",
    ),
)


def write_document(rng: random.Random, *, heldout: bool) -> tuple[str, str]:
    """Write one report of about 200 to 400 tokens about a few recurring people and goods.

    Returns:
        The text, and the id of its opening sentence.
    """
    people = [rng.choice(lx.FIRST_NAMES) for _ in range(2)]
    cast = {
        "c": [f"{rng.choice(lx.FIRST_NAMES)} {rng.choice(lx.LAST_NAMES)}" for _ in range(3)],
        "f": people,
        "i": [f"{rng.choice(lx.ADJECTIVES)} {rng.choice(lx.NOUNS)}" for _ in range(3)],
        "o": [rng.choice(lx.NOUNS) for _ in range(2)],
        "m": [rng.choice(lx.MONTHS)],
        "u": [rng.choice(lx.UNITS)],
        "w": [rng.choice(lx.WEEKDAYS) for _ in range(2)],
    }
    sentences = []
    count = rng.randint(12, 19)
    known = list(range(len(PARAGRAPHS.seen)))
    rng.shuffle(known)
    fresh = list(range(len(PARAGRAPHS.heldout)))
    rng.shuffle(fresh)
    opening = ""
    for place in range(count):
        # Held-out documents alternate, so that each stays a plausible report.
        new = heldout and bool(fresh) and place % 2 == 0
        number = fresh.pop() if new else known.pop()
        template = (PARAGRAPHS.heldout if new else PARAGRAPHS.seen)[number]
        opening = opening or f"{'h' if new else 's'}{number}"
        values = {slot: rng.choice(options) for slot, options in cast.items()}
        values["h"] = f"{rng.randint(7, 18)}:{rng.choice(('00', '15', '30', '45'))}"
        values["n"] = str(rng.randint(2, 99))
        sentences.append(template.format_map(values))
    return " ".join(sentences), opening
