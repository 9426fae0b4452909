"""Table, JUnit and step summary of the same decisions: nothing lost, nothing skipped."""

from __future__ import annotations

import dataclasses
import io
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from quantgate.measurements_file import read_measurements
from quantgate.policy import Policy, load_policy
from quantgate.report.junit import junit_xml
from quantgate.report.summary import gate_annotations, step_summary
from quantgate.report.table import next_step, release_report
from quantgate.verdict import Decision, Outcome, judge_release

GATES = Path(__file__).parents[2] / "gates"


def judged(name: str) -> tuple[Policy, tuple[Decision, ...]]:
    policy = load_policy(GATES / "policies" / f"{name}.yaml")
    measurements = read_measurements(GATES / "data" / "run" / "measurements.json")
    return policy, judge_release(policy, measurements)


def printed(decisions: tuple[Decision, ...]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(release_report(decisions, run="runs/r1"))
    return console.export_text()


def test_the_table_has_a_line_per_verdict_a_decision_per_variant_and_the_next_command() -> None:
    text = printed(judged("undecided")[1])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "bf16 orders PASS 0 pt -0.996 .. 0.996 >= -6 pt 400" in lines
    assert "errors INCONCLUSIVE 0.25 % 0.01282 .. 1.18 <= 1 % 400 n=521 would decide" in lines
    assert "oom INVALID – – <= 0 count – not measured: the server died" in lines
    assert "APPROVED bf16 all 3 gates pass" in lines
    assert "not approved int8 errors is INCONCLUSIVE; oom is INVALID" in lines
    assert "Next: quantgate promote runs/r1 --variant bf16" in lines


def test_audit_gates_that_pass_share_a_row_and_the_others_have_their_own() -> None:
    _, (bf16, _) = judged("passes")
    one = bf16.verdicts[0]
    audits = [
        dataclasses.replace(one, gate_id=name, metric=f"audit/{name}_difference.count", **changes)
        for name, changes in (
            ("coverage", {}),
            ("file", {}),
            ("format", {"outcome": Outcome.FAIL, "test": "limit", "reason": "q_proj: 5 groups"}),
        )
    ]
    text = printed((Decision(variant="bf16", verdicts=(*audits, one)),))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "bf16 audit PASS – – – – 2 gates on the stored weights pass" in lines
    assert any(line.startswith("format FAIL") and "q_proj: 5 groups" in line for line in lines)
    assert not any(line.startswith(("coverage", "file")) for line in lines)
    assert any(line.startswith(f"{one.gate_id} {one.outcome}") for line in lines)


def test_brackets_in_names_are_not_markup() -> None:
    _, (decision, _) = judged("passes")
    odd = Decision(variant="[red]v", verdicts=decision.verdicts, problems=("[b]odd",))
    assert "not approved  [red]v  [b]odd" in printed((odd,))


@pytest.mark.parametrize(
    ("name", "variants", "expected"),
    [
        ("passes", ("bf16", "int8"), "promote runs/r1 --variant int8"),
        ("fails", ("int8",), "pytest gates/ --quantgate-run runs/r1"),
        ("undecided", ("int8",), "remove the cause in the note"),
        ("undecided", (), "remove the cause in the note"),
    ],
)
def test_the_next_step_fits_the_worst_that_happened(
    name: str, variants: tuple[str, ...], expected: str
) -> None:
    decisions = [one for one in judged(name)[1] if one.variant in variants]
    assert expected in next_step(decisions, run="runs/r1")


def test_what_another_policy_approves_is_measured_for_it_before_it_is_promoted() -> None:
    decisions = judged("passes")[1]
    assert next_step(decisions, run="runs/r1", other_policy="p.yaml").startswith(
        "quantgate release p.yaml"
    )


def test_the_next_step_after_only_inconclusive_is_more_samples() -> None:
    _, (_, int8) = judged("undecided")
    undecided = Decision(variant="int8", verdicts=int8.verdicts[:3])
    assert "raise n" in next_step([undecided], run="runs/r1")


def test_junit_counts_failures_and_errors_and_skips_nothing() -> None:
    root = ET.fromstring(junit_xml(judged("undecided")[1], name="r1"))
    bf16, int8 = root
    assert [bf16.get(k) for k in ("name", "tests", "failures", "errors", "skipped")] == [
        "r1.bf16",
        "3",
        "0",
        "0",
        "0",
    ]
    assert [int8.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["4", "1", "1", "0"]
    message = int8.findall("testcase/error")[0].get("message")
    assert message is not None
    assert "not measured: the server died" in message


def test_junit_reports_a_set_of_verdicts_that_is_not_the_required_one() -> None:
    odd = Decision(variant="v", verdicts=(), problems=("no verdict for gate kl",))
    root = ET.fromstring(junit_xml([odd, Decision(variant="w", verdicts=())], name="r1"))
    messages = [error.get("message") for error in root.iter("error")]
    assert messages == ["no verdict for gate kl", "no verdicts"]


def test_the_summary_leads_with_the_decisions_and_what_does_not_pass() -> None:
    text = step_summary(judged("undecided")[1], title="Release r1")
    assert text.startswith("## Release r1\n\n- **bf16: approved**, all 3 gates pass\n")
    assert "- **int8: not approved**: errors is INCONCLUSIVE; oom is INVALID" in text
    int8 = text[text.index("### int8") :].splitlines()
    assert int8[4].startswith("| ❔ INCONCLUSIVE | `errors` |")
    assert int8[5].startswith("| ⛔ INVALID | `oom` |")
    assert int8[6].startswith("| ✅ PASS |")


def test_the_summary_of_nothing_approves_nothing() -> None:
    text = step_summary([Decision(variant="a|b", verdicts=())], title="x")
    assert "**a\\|b: not approved**: no verdicts" in text


def test_annotations_stand_on_the_line_of_the_gate() -> None:
    policy, decisions = judged("undecided")
    warning, error = gate_annotations(policy, decisions).splitlines()
    path = policy.path.as_posix()
    assert warning.startswith(f"::warning file={path},line=10,title=INCONCLUSIVE int8 errors::")
    assert "<= 1 %25 " in warning
    assert error.startswith(f"::error file={path},line=11,title=INVALID int8 oom::INVALID")


def test_annotations_of_what_passes_are_empty() -> None:
    assert gate_annotations(*judged("passes")) == ""
