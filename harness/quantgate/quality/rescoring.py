"""Scoring stored answers again: whoever has a golden set and a file of results can check it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from quantgate.errors import ArtifactError, MeasurementError
from quantgate.quality.answers import Answer
from quantgate.quality.golden import GoldenSet
from quantgate.quality.rows import SCORE, VALID, tabulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A stored cell that is not what the answer scores now."""

    item_id: str
    column: str
    stored: object
    found: object

    def __str__(self) -> str:
        return f"{self.item_id}: {self.column} is stored as {self.stored}, and is {self.found} now"


def rescore(golden: GoldenSet, path: Path) -> tuple[int, list[Difference]]:
    """Scores and checks the stored answers again.

    Returns:
        How many items the file holds, and every cell that differs.

    Raises:
        ArtifactError: not results of this set: unreadable, an unknown item, a column missing.
    """
    try:
        stored = pq.read_table(path)
        answers = list(_answers(stored))
        by_id = {item.id: item for item in golden.items}
        # In the order of the file: a lock allows the items in any.
        known = (by_id[a.item_id] for a in answers if a.item_id in by_id)
        part = replace(golden, items=tuple(known))
        found = tabulate(part, answers)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ArtifactError(f"{path}: not a file of results ({error}).") from error
    except MeasurementError as error:
        raise ArtifactError(f"{path}: not results of {golden.folder}: {error}") from error
    missing = sorted(set(found.column_names) - set(stored.column_names))
    if missing:
        raise ArtifactError(
            f"{path}: no column {missing[0]}, which {golden.folder / 'task.yaml'} asks for; the "
            "results were stored under another task."
        )
    judged = [n for n in found.column_names if n.startswith((SCORE, VALID)) or n == "target"]
    return len(answers), [
        Difference(item_id=answer.item_id, column=name, stored=before, found=now)
        for name in judged
        for answer, before, now in zip(
            answers, stored[name].to_pylist(), found[name].to_pylist(), strict=True
        )
        if before != now
    ]


def _answers(stored: pa.Table) -> Iterator[Answer]:
    for row in stored.to_pylist():
        yield Answer(
            item_id=row["id"],
            output=row["output"],
            finish_reason=row["finish_reason"],
            stop_reason=row["stop_reason"],
            token_ids=tuple(row["token_ids"]),
            choice_log_probs=tuple(row["choice_log_probs"]),
            error=row["error"],
        )
