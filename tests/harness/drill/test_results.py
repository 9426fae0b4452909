"""The mutation score: what counts as caught, and what an exit code of 0 asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantgate.drill.results import Caught, DrillResult, DrillRow, write_drill


def row(outcome: Caught, *, is_harmful: bool = True) -> DrillRow:
    return DrillRow(
        fault="f", what="w", variant="v", is_harmful=is_harmful, outcome=outcome, layer="audit",
        gates=("g",), verdict="FAIL", effect="", seconds=1.0,
    )  # fmt: skip


def result(*rows: DrillRow) -> DrillResult:
    return DrillResult(
        policy="p", policy_sha256="0", source="s", source_sha256="1", machine={}, taken_at="now",
        seconds=2.0, seconds_by_layer={"audit": 1.0}, rows=rows, blind_gates={},
        not_applicable={}, advice={},
    )  # fmt: skip


CAUGHT, PASSED = row(Caught.CAUGHT), row(Caught.PASSED, is_harmful=False)
BLOCKED = row(Caught.BLOCKED, is_harmful=False)
NOT_JUDGED = row(Caught.NOT_JUDGED, is_harmful=False)


@pytest.mark.parametrize(
    ("rows", "exit_code", "score", "alarms"),
    [
        ((CAUGHT, PASSED), 0, (1, 1), (0, 1)),
        ((CAUGHT, PASSED, row(Caught.NO_EFFECT)), 0, (1, 1), (0, 1)),
        ((CAUGHT, row(Caught.LET_THROUGH)), 1, (1, 2), (0, 0)),
        ((CAUGHT, BLOCKED), 1, (1, 1), (1, 1)),
        ((CAUGHT, BLOCKED, NOT_JUDGED), 1, (1, 1), (1, 1)),
        # What no gate has looked at is no pass, and does not dilute the false alarms either.
        ((CAUGHT, PASSED, NOT_JUDGED), 3, (1, 1), (0, 1)),
        ((PASSED,), 3, (0, 0), (0, 1)),
        ((), 3, (0, 0), (0, 0)),
    ],
)
def test_a_drill_is_clean_only_with_a_catch_no_miss_and_every_harmless_change_judged_and_passed(
    rows: tuple[DrillRow, ...], exit_code: int, score: tuple[int, int], alarms: tuple[int, int]
) -> None:
    found = result(*rows)
    assert (found.exit_code, found.is_clean) == (exit_code, exit_code == 0)
    assert (found.num_caught, found.num_harmful) == score
    assert (found.num_blocked, found.num_benign) == alarms


def test_drill_json_says_the_score_and_every_row(tmp_path: Path) -> None:
    write_drill(tmp_path / "drill.json", result(CAUGHT, PASSED, NOT_JUDGED))
    value = json.loads((tmp_path / "drill.json").read_text(encoding="utf-8"))
    assert (value["num_caught"], value["num_harmful"], value["is_clean"]) == (1, 1, False)
    assert (value["num_benign"], value["num_not_judged"]) == (1, 1)
    assert [one["outcome"] for one in value["rows"]] == ["caught", "passed", "not judged"]
