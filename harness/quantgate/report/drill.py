"""The drill's table: each fault, how large it was, and which gate caught it; also as Markdown."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from quantgate.drill.results import Caught, DrillResult, DrillRow, by_outcome

_STYLES = {
    Caught.CAUGHT: "green",
    Caught.PASSED: "green",
    Caught.NO_EFFECT: "yellow",
    Caught.NOT_JUDGED: "yellow",
    Caught.LET_THROUGH: "bold red",
    Caught.BLOCKED: "bold red",
}


def drill_report(result: DrillResult, *, path: Path) -> RenderableType:
    """Everything a drill prints at its end."""
    return Group(
        drill_table(result),
        Text(),
        Text(score(result), style="green" if result.is_clean else "red"),
        Text(took(result)),
        *_advice(result),
        *_blind(result),
        Text(str(path)),
    )


def drill_table(result: DrillResult) -> Table:
    """A row per fault and variant: harmful ones first, in the order of the catalogue."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("Fault", "Variant", "Outcome", "Caught by", "Verdict", "Effect"):
        table.add_column(column, no_wrap=column != "Effect")
    table.add_column("s", justify="right", no_wrap=True)
    for row in sorted(result.rows, key=lambda row: not row.is_harmful):
        table.add_row(
            escape(row.fault),
            escape(row.variant),
            Text(row.outcome.value, style=_STYLES[row.outcome]),
            escape(caught_by(row)),
            row.verdict,
            escape(row.effect or row.note),
            f"{row.seconds:.1f}",
        )
    return table


def drill_markdown(result: DrillResult) -> str:
    """The score, and a row per fault with a column per variant: what caught it, or that it passed.

    Faults of one name in several schemes are one row, since they are one idea.
    """
    variants = list(dict.fromkeys(row.variant for row in result.rows))
    faults: dict[tuple[bool, str], dict[str, DrillRow]] = {}
    for row in result.rows:
        faults.setdefault((not row.is_harmful, row.fault), {})[row.variant] = row
    lines = [
        score(result),
        "",
        f"{result.policy}, {result.taken_at[:10]}, {result.machine.get('cpu', 'unknown CPU')}; "
        + took(result),
        "",
        "| fault | what it does | " + " | ".join(variants) + " |",
        "|---|---|" + "---|" * len(variants),
    ]
    for (is_harmless, name), rows in sorted(faults.items(), key=lambda one: one[0][0]):
        what = next(iter(rows.values())).what
        title = f"*{name}* (harmless)" if is_harmless else f"`{name}`"
        cells = (_cell(rows.get(variant)) for variant in variants)
        lines.append(f"| {title} | {what} | " + " | ".join(cells) + " |")
    notes = [f"- {line.plain}" for line in (*_advice(result), *_blind(result))]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def _cell(row: DrillRow | None) -> str:
    if row is None:
        return "–"
    if row.outcome is not Caught.CAUGHT:
        loud = row.outcome in (Caught.LET_THROUGH, Caught.BLOCKED, Caught.NOT_JUDGED)
        return f"**{row.outcome.value}**" if loud else row.outcome.value
    return caught_by(row)


def caught_by(row: DrillRow) -> str:
    """The layer and the first gate, and how many more."""
    if not row.gates:
        return row.layer
    more = f" +{len(row.gates) - 1}" if len(row.gates) > 1 else ""
    return f"{row.layer}: {row.gates[0]}{more}"


def score(result: DrillResult) -> str:
    """The two numbers of a drill, in a sentence."""
    unseen, unjudged = result.count(Caught.NO_EFFECT), result.num_not_judged
    text = (
        f"mutation score {result.num_caught}/{result.num_harmful} harmful faults caught, "
        f"false alarms {result.num_blocked}/{result.num_benign} harmless changes blocked"
    )
    if unjudged:
        text += f" and {unjudged} not judged"
    return f"{text}, {unseen} without an effect that could be seen" if unseen else text


def took(result: DrillResult) -> str:
    """How long it took, layer by layer."""
    parts = ", ".join(f"{name} {value:.0f}" for name, value in result.seconds_by_layer.items())
    return f"{result.seconds:.0f} s ({parts})"


def _advice(result: DrillResult) -> list[Text]:
    lines = []
    for row in by_outcome(result.rows, Caught.LET_THROUGH):
        gate = result.advice.get(row.fault)
        add = f"  add: {gate}" if gate else ""
        note = f"  ({row.note})" if row.note else ""
        lines.append(Text(f"let through: {row.fault} in {row.variant}: {row.what}{note}{add}"))
    for row in by_outcome(result.rows, Caught.BLOCKED):
        lines.append(
            Text(f"false alarm: {', '.join(row.gates)} blocks {row.fault} in {row.variant}")
        )
    for row in by_outcome(result.rows, Caught.NOT_JUDGED):
        # Its note begins with the words of its outcome.
        lines.append(Text(f"{row.fault} in {row.variant}: {row.note}"))
    for row in by_outcome(result.rows, Caught.NO_EFFECT):
        lines.append(Text(f"no effect: {row.fault} in {row.variant}: {row.note}"))
    return lines


def _blind(result: DrillResult) -> list[Text]:
    return [
        Text(
            f"{variant}: {', '.join(gates)} do not pass when it is sound, so they catch nothing",
            style="yellow",
        )
        for variant, gates in result.blind_gates.items()
    ]
