"""One row per item: the answer, its scores and its checks, as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from quantgate.errors import MeasurementError
from quantgate.quality.answers import Answer
from quantgate.quality.golden import GoldenSet
from quantgate.quality.scoring import score_items
from quantgate.quality.validity import ValidityCheck, is_valid

SCORE = "score."
VALID = "valid."
"""What begins the names of columns: `score.exact_match`, `valid.finished`."""


def check_names(checks: Sequence[ValidityCheck]) -> list[str]:
    """The statistic of each check's metric; a type used twice is numbered."""
    types = [check.type for check in checks]
    return [
        kind if types.count(kind) == 1 else f"{kind}{types[: i + 1].count(kind)}"
        for i, kind in enumerate(types)
    ]


def tabulate(golden: GoldenSet, answers: Sequence[Answer]) -> pa.Table:
    """One row per item with its answer, scores and checks.

    Raises:
        MeasurementError: the answers are not those of the items, in their order.
    """
    items = golden.items
    columns: dict[str, list[Any]] = {
        "id": [item.id for item in items],
        "cluster": [item.cluster for item in items],
        "tags": [list(item.tags) for item in items],
        "target": [item.target for item in items],
        "output": [answer.output for answer in answers],
        "finish_reason": [answer.finish_reason for answer in answers],
        "stop_reason": [answer.stop_reason for answer in answers],
        "num_tokens": [len(answer.token_ids) for answer in answers],
        "token_ids": [list(answer.token_ids) for answer in answers],
        "choice_log_probs": [list(answer.choice_log_probs) for answer in answers],
        "error": [answer.error for answer in answers],
    }
    if [answer.item_id for answer in answers] != columns["id"]:
        raise MeasurementError(f"{golden.name}: answers are not those of the items, in order.")
    for spec in golden.task.metric_list:
        scores = score_items(spec.metric, columns["output"], columns["target"])
        # No answer is a wrong answer, also where an empty output would equal an empty target.
        columns[SCORE + spec.metric] = [
            0.0 if answer.error else score for answer, score in zip(answers, scores, strict=True)
        ]
    for name, check in zip(check_names(golden.task.validity), golden.task.validity, strict=True):
        columns[VALID + name] = [
            answer.error is None and is_valid(check, answer) for answer in answers
        ]
    return pa.table(columns)
