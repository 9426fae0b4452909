"""The columns of verdicts, in which tables of runs are compared."""

from __future__ import annotations

from pathlib import Path

from quantgate.measurements_file import read_measurements
from quantgate.policy import load_policy
from quantgate.report.columns import columns_of_release, columns_of_seconds, columns_of_verdicts
from quantgate.verdict import Decision, judge_release

GATES = Path(__file__).parents[2] / "gates"


def decisions() -> tuple[Decision, ...]:
    policy = load_policy(GATES / "policies" / "undecided.yaml")
    return judge_release(policy, read_measurements(GATES / "data" / "run" / "measurements.json"))


def test_gate_and_verdict_come_first_since_comparing_runs_shows_these() -> None:
    columns = columns_of_verdicts(decisions()[1])
    assert list(columns)[:2] == ["gate", "verdict"]
    found = dict(zip(columns["gate"], columns["verdict"], strict=True))
    assert found["errors"] == "INCONCLUSIVE"
    assert found["oom"] == "INVALID"
    assert len({len(values) for values in columns.values()}) == 1


def test_a_release_has_every_verdict_of_every_variant_under_its_name() -> None:
    every = decisions()
    columns = columns_of_release(every)
    assert columns["gate"] == [f"{d.variant} {v.gate_id}" for d in every for v in d.verdicts]
    assert columns["verdict"] == [str(v.outcome) for d in every for v in d.verdicts]


def test_no_verdicts_are_an_empty_table() -> None:
    assert columns_of_verdicts(Decision(variant="v", verdicts=())) == {"gate": []}
    assert columns_of_release(()) == {}


def test_what_took_longest_comes_first_whatever_it_was_part_of() -> None:
    seconds = {"source": {"order-total": 4.04, "served": 5.0}, "int8": {"order-total": 9.96}}
    assert columns_of_seconds(seconds) == {
        "part": ["int8 order-total", "source served", "source order-total"],
        "seconds": [10.0, 5.0, 4.0],
    }
    assert columns_of_seconds({}) == {"part": [], "seconds": []}
