"""Writes the demo's golden sets and calibration documents, byte for byte the same every time.

`python -m quantgate.demo.golden --out golden_sets --calibration calibration.jsonl`
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.demo.cards import card_text, task_text
from quantgate.demo.language import TASKS, Sample, Task, sample, split_of_prompt
from quantgate.demo.tokenizer import render

SIZES: dict[Task, int] = {
    "extract": 480,
    "route": 1600,
    "total": 480,
    "lookup": 480,
    "prose": 128,
}
# Field scores are judged by phrasing: a second item of one phrasing costs as much as the first item
# of another, and says less. The other sets are judged by item, or have a cluster for each document.
MOST_PER_CLUSTER: dict[Task, int] = {"extract": 1}
# Drawing more of a phrasing than there may be is in vain; a language with too few phrasings shows
# here. The set of orders takes 2.7 draws an item.
MOST_DRAWS_PER_ITEM = 8
CALIBRATION_DOCUMENTS = 128
# Mostly conversations, as in service; prose keeps the calibration from seeing templates only.
CALIBRATION_CYCLE: tuple[Task, ...] = (
    *("extract", "total", "lookup", "route", "extract", "total", "lookup", "prose"),
)


class OverlapError(ValueError):
    """A golden prompt could be met in another split."""


class TooFewPhrasingsError(ValueError):
    """The language has too few phrasings for a set of this size."""


@dataclass(frozen=True)
class Disjointness:
    """What `prove_disjoint` looked at."""

    golden_prompts: int
    training_prompts: int


def golden_samples(task: Task) -> list[Sample]:
    """The first golden samples of the task, less what repeats a prompt or too often a phrasing.

    Raises:
        TooFewPhrasingsError: the draws run out before the set is full.
    """
    size, most = SIZES[task], MOST_PER_CLUSTER.get(task, SIZES[task])
    chosen: dict[str, Sample] = {}
    taken: Counter[str] = Counter()
    for index in range(MOST_DRAWS_PER_ITEM * size):
        made = sample(task, "golden", index)
        if made.prompt in chosen or taken[made.cluster] == most:
            continue
        chosen[made.prompt] = made
        taken[made.cluster] += 1
        if len(chosen) == size:
            return list(chosen.values())
    raise TooFewPhrasingsError(
        f"{task}: {MOST_DRAWS_PER_ITEM * size:,} draws gave {len(chosen):,} of {size:,} items, "
        f"at most {most} of each of {len(taken):,} phrasings. Add phrasings to the lexicon, or "
        "allow more items of one."
    )


def golden_item(made: Sample) -> dict[str, Any]:
    """One line of `items.jsonl`."""
    name = f"order-{made.task}"
    item: dict[str, Any] = {"id": f"{name}-{made.index:05}"}
    if made.task == "prose":
        # Every document is a cluster of its own: its tokens depend on one another.
        return item | {"input": made.prompt, "tags": list(made.tags), "cluster": item["id"]}
    item["input"] = [{"role": "user", "content": made.prompt}]
    item["target"] = made.target
    if made.choices:
        item["choices"] = list(made.choices)
    return item | {"tags": list(made.tags), "cluster": made.cluster}


def calibration_documents() -> list[str]:
    """Rendered conversations of the calibration split, answers included."""
    cycle = CALIBRATION_CYCLE
    return [
        render(sample(cycle[index % len(cycle)], "calibration", index))
        for index in range(CALIBRATION_DOCUMENTS)
    ]


def prove_disjoint(training_indices: dict[Task, range]) -> Disjointness:
    """Show that no golden prompt is a training prompt.

    The proof is that every golden prompt's digest lies in the golden share, which no other split
    may emit. Replaying the training stream checks the proof's premise on the data itself.

    Raises:
        OverlapError: A prompt is in the wrong share, or was trained on.
    """
    golden = {made.prompt for task in TASKS for made in golden_samples(task)}
    for prompt in golden:
        if split_of_prompt(prompt) != "golden":
            raise OverlapError(f"this golden prompt belongs to another split: {prompt[:80]!r}")
    replayed = 0
    for task, indices in training_indices.items():
        for index in indices:
            prompt = sample(task, "train", index).prompt
            replayed += 1
            if prompt in golden:
                raise OverlapError(f"training sample {task}/{index} is golden: {prompt[:80]!r}")
    return Disjointness(golden_prompts=len(golden), training_prompts=replayed)


def write_golden_sets(folder: Path) -> list[Path]:
    """Write items.jsonl, task.yaml and CARD.md of each set; returns the files written."""
    written = []
    for task in TASKS:
        target = folder / f"order-{task}"
        target.mkdir(parents=True, exist_ok=True)
        samples = golden_samples(task)
        files = {
            "items.jsonl": _json_lines([golden_item(made) for made in samples]),
            "task.yaml": task_text(task),
            "CARD.md": card_text(task, samples),
        }
        for name, text in files.items():
            written.append(_write_whole(target / name, text))
    return written


def write_calibration(path: Path) -> Path:
    """Write the calibration documents as JSON lines with the key `text`."""
    return _write_whole(path, _json_lines([{"text": text} for text in calibration_documents()]))


def _json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_whole(path: Path, text: str) -> Path:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(text.encode())
    draft.replace(path)
    return path


def main() -> None:
    """Command line of the golden set generator."""
    parser = argparse.ArgumentParser(prog="python -m quantgate.demo.golden", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("golden_sets"))
    parser.add_argument(
        "--calibration", type=Path, default=Path(__file__).parent / "calibration.jsonl"
    )
    arguments = parser.parse_args()
    for path in [*write_golden_sets(arguments.out), write_calibration(arguments.calibration)]:
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
