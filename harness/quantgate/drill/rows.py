"""From a trial to its row: what became of the fault, who said so, and how large it was."""

from __future__ import annotations

from collections.abc import Sequence

from quantgate.drill.fault import AnyFault
from quantgate.drill.layers import AUDIT, DISTRIBUTION, SERVED, Measured
from quantgate.drill.planting import Refused
from quantgate.drill.results import Caught, DrillRow
from quantgate.drill.trials import Sound, Trial
from quantgate.measure import Clustered, Scalar
from quantgate.verdict import Outcome, Verdict

_SERVED_KL = "quality/served_kl_nats.mean"
NO_EFFECT = 1.05
"""A mean KL within this factor of the sound variant's is no effect to be seen."""


def row_of(trial: Trial, sound: Sound) -> DrillRow:
    """The row of a trial that went through the layers."""
    blocking: tuple[Outcome, ...] = (Outcome.FAIL, Outcome.INVALID)
    if not trial.fault.is_harmful:
        # Undecided blocks a promotion as well.
        blocking = (*blocking, Outcome.INCONCLUSIVE)
    layer, turned = "", list[Verdict]()
    for layer in trial.verdicts:
        turned = sound.turned(trial, layer, *blocking)
        if turned:
            break
    outcome = _outcome(trial, sound, is_caught=bool(turned))
    return DrillRow(
        fault=trial.fault.name,
        what=trial.fault.what,
        variant=trial.sound.name,
        is_harmful=trial.fault.is_harmful,
        outcome=outcome,
        layer=layer if turned else "",
        gates=tuple(verdict.gate_id for verdict in turned),
        verdict=turned[0].outcome.value if turned else "",
        effect=_effect(trial, sound),
        seconds=round(trial.seconds, 2),
        note=_note(trial, sound, outcome, turned),
    )


def refused_row(fault: AnyFault, variant: str, refusal: Refused, *, seconds: float) -> DrillRow:
    """The row of a fault that never came to a gate."""
    return DrillRow(
        fault=fault.name,
        what=fault.what,
        variant=variant,
        is_harmful=fault.is_harmful,
        outcome=Caught.CAUGHT if fault.is_harmful else Caught.BLOCKED,
        layer=refusal.layer,
        gates=(),
        verdict="refused",
        effect="",
        seconds=round(seconds, 2),
        note=str(refusal).splitlines()[0],
    )


def _outcome(trial: Trial, sound: Sound, *, is_caught: bool) -> Caught:
    if not trial.fault.is_harmful and not is_caught:
        return Caught.PASSED if sound.is_judged(trial) else Caught.NOT_JUDGED
    if not trial.fault.is_harmful:
        return Caught.BLOCKED
    if is_caught:
        return Caught.CAUGHT
    factor = _kl_factor(trial, sound)
    if trial.fault.why_invisible and factor is not None and factor <= NO_EFFECT:
        return Caught.NO_EFFECT
    return Caught.LET_THROUGH


def _note(trial: Trial, sound: Sound, outcome: Caught, turned: Sequence[Verdict]) -> str:
    if outcome in (Caught.CAUGHT, Caught.BLOCKED):
        return turned[0].reason
    held = [
        verdict.gate_id
        for layer in trial.verdicts
        for verdict in sound.turned(trial, layer, Outcome.INCONCLUSIVE)
    ]
    undecided = f"undecided: {', '.join(held)}" if held else ""
    unseen = "" if sound.is_judged(trial) else sound.why_not_judged(trial)
    why = trial.fault.why_invisible if outcome is not Caught.PASSED else ""
    return "; ".join(filter(None, (undecided, unseen, why)))


def _kl_factor(trial: Trial, sound: Sound) -> float | None:
    """Mean KL over the sound variant's; None where either was not measured.

    A fault of the server alone adds KL between what is served and what is computed offline.
    """
    healthy = _mean_kl(sound.measured(DISTRIBUTION, trial.sound.name))
    if DISTRIBUTION in trial.layers:
        mine = _mean_kl(trial.measured.get(DISTRIBUTION))
        return None if mine is None or not healthy else mine / healthy
    served = _mean_kl(trial.measured.get(SERVED), _SERVED_KL)
    before = _mean_kl(sound.measured(SERVED, trial.sound.name), _SERVED_KL)
    if served is None or before is None or not healthy:
        return None
    return (healthy + served) / (healthy + before)


def _effect(trial: Trial, sound: Sound) -> str:
    """How large the fault is, by the deepest layer that has a number for it."""
    factor, kl = _kl_factor(trial, sound), _mean_kl(trial.measured.get(DISTRIBUTION))
    served = _mean_kl(trial.measured.get(SERVED), _SERVED_KL)
    if DISTRIBUTION not in trial.layers and served is not None:
        usual = _mean_kl(sound.measured(SERVED, trial.sound.name), _SERVED_KL)
        times = f", {served / usual:.3g} x sound" if usual else ""
        return f"served KL {served:.3g} nats{times}"
    if factor is not None and kl is not None:
        return f"KL {kl:.3g} nats, {factor:.3g} x sound"
    audited, healthy = trial.measured.get(AUDIT), sound.measured(AUDIT, trial.sound.name)
    if audited is None or healthy is None:
        return ""
    values, before = _scalars(audited), _scalars(healthy)
    parts = []
    error, gain = values.get("audit/weight_error.ratio"), values.get("audit/group_gain.ratio")
    if error is not None and error > NO_EFFECT * before.get("audit/weight_error.ratio", 0.0):
        parts.append(f"weights {error:.3g} x rounding")
    if gain is not None and gain > 1.25 and (error or 0) < 3:
        parts.append(f"a scale off by {gain:.3g} x")
    changed = [
        f"{value:g} {metric.removeprefix('audit/').removesuffix('.count').replace('_', ' ')}"
        for metric, value in values.items()
        if metric.endswith("_difference.count") and value
    ]
    return ", ".join(parts + changed)


def _scalars(measured: Measured) -> dict[str, float]:
    return {m.metric: m.value for m in measured.measurements if isinstance(m, Scalar)}


def _mean_kl(measured: Measured | None, metric: str = "quality/kl_nats.mean") -> float | None:
    for measurement in measured.measurements if measured else ():
        if measurement.metric == metric and isinstance(measurement, Clustered):
            return sum(measurement.totals) / sum(measurement.counts)
    return None
