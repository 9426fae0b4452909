"""The verdict table of the terminal: a line per variant × gate, the decisions, the next command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from quantgate.audit.judgement import JudgedAudit
from quantgate.verdict import Decision, Outcome, Verdict

STYLES = {
    Outcome.PASS: "green",
    Outcome.FAIL: "bold red",
    Outcome.INCONCLUSIVE: "yellow",
    Outcome.INVALID: "bold magenta",
}


def release_report(
    decisions: Sequence[Decision],
    *,
    run: str,
    divergence: RenderableType | None = None,
    other_policy: str | None = None,
) -> RenderableType:
    """Everything a release prints at its end.

    Args:
        run: the release folder as a person types it.
        other_policy: the file of the policy, if it is another than the one measured for.
        divergence: what is reported and not judged; see `divergence.py`.
    """
    return Group(
        verdict_table((decision.verdicts for decision in decisions), folds_audit=True),
        Text(),
        *((divergence, Text()) if divergence else ()),
        *(decision_line(decision) for decision in decisions),
        Text(),
        Text.assemble(("Next: ", "bold"), next_step(decisions, run=run, other_policy=other_policy)),
    )


def audit_report(judged: Sequence[JudgedAudit]) -> RenderableType:
    """What `quantgate audit` prints: the audit gates, and where every weight can be looked up."""
    reports = [f"{one.variant:12} {one.report}" for one in judged if one.report]
    unjudged = [one.variant for one in judged if not one.verdicts]
    lines = [Text(line) for line in reports]
    if unjudged:
        lines.append(
            Text(
                f"No gate of the policy asks for an audit of {', '.join(unjudged)}, and absence "
                "never passes. Add gates on audit/… metrics (docs/audit.md).",
                style="bold magenta",
            )
        )
    return Group(verdict_table(one.verdicts for one in judged), Text(), *lines)


def verdict_table(groups: Iterable[Sequence[Verdict]], *, folds_audit: bool = False) -> Table:
    """A section per variant: its verdicts in the order of the policy.

    Args:
        folds_audit: one row for all audit gates that pass; the others have a row each.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Variant", no_wrap=True)
    table.add_column("Gate", no_wrap=True)
    table.add_column("Verdict", no_wrap=True)
    table.add_column("Observed", justify="right", no_wrap=True)
    table.add_column("Bounds", justify="right", no_wrap=True)
    table.add_column("Limit", justify="right", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("Note", ratio=1)
    for verdicts in groups:
        folded = [verdict for verdict in verdicts if folds_audit and _is_sound_audit(verdict)]
        if folded:
            table.add_row(
                escape(folded[0].variant),
                "audit",
                Text(Outcome.PASS, style=STYLES[Outcome.PASS]),
                *("–", "–", "–", "–"),
                f"{len(folded)} gates on the stored weights pass",
            )
        shown = [verdict for verdict in verdicts if verdict not in folded]
        for position, verdict in enumerate(shown, start=bool(folded)):
            table.add_row(
                escape(verdict.variant) if position == 0 else "",
                escape(verdict.gate_id),
                Text(verdict.outcome, style=STYLES[verdict.outcome]),
                verdict.observed(),
                verdict.bounds(),
                verdict.allowed(),
                f"{verdict.n:,}" if verdict.n else "–",
                escape(note(verdict)),
            )
        table.add_section()
    return table


def _is_sound_audit(verdict: Verdict) -> bool:
    return verdict.metric.startswith("audit/") and verdict.outcome is Outcome.PASS


def note(verdict: Verdict) -> str:
    """What a reader needs next to the numbers: why there are none, or how many would decide."""
    if verdict.outcome is Outcome.INCONCLUSIVE:
        return verdict.needed()
    # A single number is about one weight or file; which one is the likely cause.
    is_telling = verdict.outcome is Outcome.INVALID or (
        verdict.outcome is Outcome.FAIL and verdict.test == "limit"
    )
    return verdict.reason if is_telling else ""


def decision_line(decision: Decision) -> Text:
    if decision.approved:
        count = len(decision.verdicts)
        return Text.assemble(
            ("APPROVED      ", "bold green"), f"{decision.variant}  all {count} gates pass"
        )
    reasons = "; ".join(decision.reasons) or "no verdicts"
    return Text.assemble(("not approved  ", "bold red"), f"{decision.variant}  {reasons}")


def next_step(decisions: Sequence[Decision], *, run: str, other_policy: str | None = None) -> str:
    """The command to type next. Of several approved variants the last one written in the policy is
    named: policies list candidates from the widest weights to the narrowest."""
    approved = [decision.variant for decision in decisions if decision.approved]
    if approved and other_policy:
        return f"quantgate release {other_policy}   (promoted is what was measured for a policy)"
    if approved:
        return f"quantgate promote {run} --variant {approved[-1]}"
    outcomes = {outcome for decision in decisions for outcome in decision.outcomes}
    if Outcome.FAIL in outcomes:
        return f"pytest gates/ --quantgate-run {run}   (each failing gate, with its numbers)"
    if Outcome.INVALID in outcomes or not outcomes:
        return "remove the cause in the note, then run the same quantgate release again"
    return "raise n as the notes say (items, requests or blocks), then run quantgate release again"
