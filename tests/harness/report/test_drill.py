"""The drill as Markdown: one row per fault, one column per variant."""

from __future__ import annotations

from quantgate.drill.results import Caught, DrillResult, DrillRow
from quantgate.report.drill import drill_markdown


def row(fault: str, variant: str, outcome: Caught, *gates: str) -> DrillRow:
    return DrillRow(
        fault=fault, what=f"what {fault} does", variant=variant,
        is_harmful=outcome not in (Caught.PASSED, Caught.BLOCKED, Caught.NOT_JUDGED),
        outcome=outcome,
        layer="audit" if gates else "", gates=gates, verdict="", effect="", seconds=1.0,
        note="not judged: no gate looks" if outcome is Caught.NOT_JUDGED else "",
    )  # fmt: skip


def lines_of(*rows: DrillRow) -> list[str]:
    result = DrillResult(
        policy="p", policy_sha256="0", source="s", source_sha256="1", machine={"cpu": "EPYC"},
        taken_at="2026-11-24T10:00:00", seconds=9.0, seconds_by_layer={"plant": 4.0, "audit": 5.0},
        rows=rows, blind_gates={"b": ("speed",)}, not_applicable={},
        advice={"quiet": "{id: loud}"},
    )  # fmt: skip
    return drill_markdown(result).splitlines()


def test_faults_are_rows_and_variants_are_columns() -> None:
    lines = lines_of(
        row("same", "a", Caught.PASSED),
        row("broken", "a", Caught.CAUGHT, "weights", "groups"),
        row("broken", "b", Caught.CAUGHT, "weights"),
    )
    assert lines[0] == (
        "mutation score 2/2 harmful faults caught, false alarms 0/1 harmless changes blocked"
    )
    assert lines[2] == "p, 2026-11-24, EPYC; 9 s (plant 4, audit 5)"
    assert lines[4:8] == [
        "| fault | what it does | a | b |",
        "|---|---|---|---|",
        "| `broken` | what broken does | audit: weights +1 | audit: weights |",
        "| *same* (harmless) | what same does | passed | – |",
    ]


def test_what_is_wrong_stands_out_with_the_gate_to_add() -> None:
    lines = lines_of(
        row("quiet", "a", Caught.LET_THROUGH), row("twin", "a", Caught.BLOCKED, "weights")
    )
    assert "| `quiet` | what quiet does | **LET THROUGH** |" in lines
    assert "| *twin* (harmless) | what twin does | **BLOCKED** |" in lines
    assert "- let through: quiet in a: what quiet does  add: {id: loud}" in lines
    assert "- b: speed do not pass when it is sound, so they catch nothing" in lines


def test_a_harmless_change_that_no_gate_judged_is_listed_and_is_no_pass() -> None:
    lines = lines_of(
        row("broken", "a", Caught.CAUGHT, "weights"),
        row("same", "a", Caught.PASSED),
        row("other", "a", Caught.NOT_JUDGED),
    )
    assert lines[0].endswith("false alarms 0/1 harmless changes blocked and 1 not judged")
    assert "| *other* (harmless) | what other does | **not judged** |" in lines
    assert "- other in a: not judged: no gate looks" in lines
