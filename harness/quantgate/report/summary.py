"""What a CI job shows without opening a log: a Markdown summary, and annotations on the policy.

The annotations are GitHub workflow commands; each stands on the line of the gate in the YAML file.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantgate.policy import Policy
from quantgate.report.table import note
from quantgate.verdict import Decision, Outcome, Verdict

_HEADER = "| | gate | observed | bounds | limit | n | note |\n|---|---|---:|---:|---:|---:|---|\n"
_MARKS = {
    Outcome.PASS: "✅",
    Outcome.FAIL: "❌",
    Outcome.INCONCLUSIVE: "❔",
    Outcome.INVALID: "⛔",
}


def step_summary(decisions: Sequence[Decision], *, title: str) -> str:
    """Markdown: the decisions, then each variant's verdicts, those that are not PASS first."""
    parts = [f"## {_cell(title)}\n"]
    parts += [f"- {_decision(decision)}" for decision in decisions]
    for decision in decisions:
        # sorted() is stable: within each group the order is the policy's.
        rows = sorted(decision.verdicts, key=lambda verdict: verdict.outcome is Outcome.PASS)
        parts.append(f"\n### {_cell(decision.variant)}\n\n{_HEADER}" + "\n".join(map(_row, rows)))
    return "\n".join(parts) + "\n"


def gate_annotations(policy: Policy, decisions: Sequence[Decision]) -> str:
    """One workflow command per verdict that is not PASS, one per line; empty when all pass."""
    lines = []
    for decision in decisions:
        for verdict in decision.verdicts:
            if verdict.outcome is not Outcome.PASS:
                lines.append(_annotation(policy, verdict))
    return "".join(f"{line}\n" for line in lines)


def _annotation(policy: Policy, verdict: Verdict) -> str:
    # An INCONCLUSIVE gate blocks the release like the others, but nothing is known to be wrong.
    level = "warning" if verdict.outcome is Outcome.INCONCLUSIVE else "error"
    file = _property(policy.path.as_posix())
    title = _property(f"{verdict.outcome} {verdict.variant} {verdict.gate_id}")
    line = policy.gate_line(verdict.gate_id)
    return f"::{level} file={file},line={line},title={title}::{_message(verdict.line())}"


def _decision(decision: Decision) -> str:
    if decision.approved:
        return f"**{_cell(decision.variant)}: approved**, all {len(decision.verdicts)} gates pass"
    reasons = "; ".join(decision.reasons) or "no verdicts"
    return f"**{_cell(decision.variant)}: not approved**: {_cell(reasons)}"


def _row(verdict: Verdict) -> str:
    cells = (
        f"{_MARKS[verdict.outcome]} {verdict.outcome}",
        f"`{verdict.gate_id}`",
        verdict.observed(),
        verdict.bounds(),
        verdict.allowed(),
        f"{verdict.n:,}" if verdict.n else "–",
        note(verdict),
    )
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text that cannot end a table cell or open a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
