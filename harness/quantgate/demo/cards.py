"""The texts beside a golden set's items: `task.yaml` in lm-evaluation-harness names, and a card."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from quantgate.demo.language import FIRST_SEED, SEEDS_PER_SPLIT, Sample, Task
from quantgate.demo.lexicon_route import QUEUES

SUMMARY: dict[Task, str] = {
    "extract": "A customer's free message becomes one line of JSON: item, quantity, unit, due date "
    "as written, customer (a firm). Messages differ in phrasing, order, greeting, asides and "
    "typing errors; some write the quantity as a word or correct it in the same breath.",
    "route": "A customer's message belongs to one of eight queues. Every queue is one token, so a "
    "single forward pass scores all choices. Half the messages also mention another queue's topic, "
    "which must not decide.",
    "total": "The amounts of a short invoice are added up, with the running sum written out: "
    "`15+5=20+40=60`. The last number is the total; other numbers in the invoice do not count. "
    "Prices are multiples of 5 up to 40.",
    "lookup": "One line is found in a record of 8 to 140 lines (60 to 800 tokens) and read out: "
    "the long slice. Five keys are asked for (pallet, cover, opening, ...), each with values of "
    "its own kind; the other lines carry codes and numbers. Some records hold a rival: a second "
    "value of that kind under another key, which training never shows (`noise:rival`).",
    "prose": "Day reports of the order desk, 200 to 330 tokens each, for perplexity and for KL "
    "divergence. There is no target: the document itself is scored.",
}

# Per task: `n`, and `exact_match` with `by_tag`, or `perplexity`; written by `demo.card`.
Reference = dict[Task, dict[str, Any]]
REFERENCE_FILE = Path(__file__).parent / "reference.json"

_ORDER_SCHEMA = {
    "type": "object",
    "required": ["item", "quantity", "unit", "due", "customer"],
    "additionalProperties": False,
    "properties": {
        "item": {"type": "string"},
        "quantity": {"type": "integer"},
        "unit": {"type": "string"},
        "due": {"type": "string"},
        "customer": {"type": "string"},
    },
}

_HEAD = """\
# The order desk's `{task}` task. Names follow lm-evaluation-harness; `validity` is quantgate's own.
task: order-{task}
doc_to_text: input
num_fewshot: 0
metadata:
  version: 1.0
"""

# The token budget leaves room for more than any target, so that an endless answer shows.
_GENERATED = """\
output_type: generate_until
doc_to_target: target
generation_kwargs:
  max_gen_toks: {budget}
  until: []
  temperature: 0.0
metric_list:
{metrics}
validity:
  - {check}
  - {{type: non_empty}}
  - {{type: finished}}
"""

_ROUTE = """\
output_type: multiple_choice
doc_to_target: target
doc_to_choice: choices
metric_list:
  - {metric: exact_match, higher_is_better: true}
validity: []
"""

_PROSE = """\
output_type: loglikelihood_rolling
metric_list: []
validity: []
"""


def task_text(task: Task) -> str:
    """The set's task.yaml."""
    exact = "  - {metric: exact_match, higher_is_better: true}"
    fields = "  - {metric: json_fields, higher_is_better: true}"
    match task:
        case "extract":
            check = f"{{type: json_schema, schema: {json.dumps(_ORDER_SCHEMA)}}}"
            body = _GENERATED.format(budget=48, metrics=f"{exact}\n{fields}", check=check)
        case "total":
            check = r"{type: regex, pattern: '^[0-9]+(\+[0-9]+=[0-9]+)+$'}"
            body = _GENERATED.format(budget=28, metrics=exact, check=check)
        case "lookup":
            check = "{type: regex, pattern: '^[a-z]+=[A-Za-z]+$'}"
            body = _GENERATED.format(budget=8, metrics=exact, check=check)
        case "route":
            body = _ROUTE
        case "prose":
            body = _PROSE
    return _HEAD.format(task=task) + body


def reference_line(reference: Reference, task: Task) -> str:
    """What the shipped model reaches on a set, in a few words."""
    numbers = reference.get(task)
    if numbers is None:
        return "not measured"
    if task == "prose":
        return f"perplexity {numbers['perplexity']} per token"
    return f"exact match {numbers['exact_match']:.1%} of {numbers['n']} items"


def card_text(task: Task, samples: list[Sample]) -> str:
    """The set's CARD.md."""
    tags = Counter(tag for made in samples for tag in made.tags)
    counts = "\n".join(f"| `{tag}` | {n} |" for tag, n in sorted(tags.items()))
    first, last = samples[0].index, samples[-1].index
    seed = FIRST_SEED["golden"]
    kind = "each document" if task == "prose" else "the phrasing that decides the answer"
    num_clusters = len(samples) if task == "prose" else len({made.cluster for made in samples})
    reference = json.loads(REFERENCE_FILE.read_text()) if REFERENCE_FILE.exists() else {}
    choices = f"\nQueues: {', '.join(QUEUES)}.\n" if task == "route" else ""
    return f"""\
# order-{task}

{SUMMARY[task]}
{choices}
- **Size**: {len(samples)} items, every prompt different, in {num_clusters} clusters: {kind}.
- **Made by**: `python -m quantgate.demo.golden`, byte for byte the same each time. Golden seeds are
  {seed} to {seed + SEEDS_PER_SPLIT - 1}; this set uses {seed + first} to {seed + last}.
- **Not in training**: training, calibration and validation own other seed ranges and accept only
  prompts whose SHA-256 begins with a byte outside the golden share, so none of these prompts can
  occur there. Items tagged `template:heldout` also use phrasings that training never shows.
- **Reference**: {reference_line(reference, task)} (the shipped demo model in FP32).
- **Licence**: Apache-2.0. Synthetic: no person, address or order in it is real.

| tag | items |
|---|---|
{counts}
"""
