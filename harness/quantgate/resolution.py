"""Whether a gate asks for less than its measurement can tell: a limit finer than the noise floor.

The floor is how far the reference differs from itself at another batch size and order. A gate whose
limit is nearer to "no difference" than that judges noise, so its verdict is INVALID.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from quantgate.gate import Gate
from quantgate.measure import Missing, Scalar
from quantgate.units import parse_metric

NoiseFloor: TypeAlias = Scalar | Missing
NoiseFloors: TypeAlias = Mapping[str, NoiseFloor]
"""By the metric whose gates they bound; values are distances from no difference."""

_SHARES_OF_AGREEMENT = ("top1_agreement",)
_DISTRIBUTIONS = (
    *_SHARES_OF_AGREEMENT,
    *("kl_nats", "perplexity", "served_kl_nats", "served_logprob_difference_nats"),
)
_IN_UNITS = (".healthy", ".reference", ".itself")


def has_noise_floor(metric: str) -> bool:
    """Whether the reference, measured against itself, says how fine a gate on `metric` may be.

    Not what is in units of the healthy twin's KL, which is far above any noise, or of how far a
    server is from offline scoring or from itself, which is such noise.
    """
    name = parse_metric(metric)
    if name.noun.endswith(_IN_UNITS):
        return False
    return name.is_golden_set or name.stem in _DISTRIBUTIONS


def why_too_fine(gate: Gate, floors: NoiseFloors) -> str | None:
    """The reason why the gate may not judge; None where it may.

    A limit exactly at the floor is not finer than it.
    """
    if not has_noise_floor(gate.metric):
        return None
    floor = floors.get(gate.metric)
    if floor is None:
        return "no noise floor: the reference was not measured against itself"
    if isinstance(floor, Missing):
        return f"no noise floor: {floor.reason}"
    fineness = _distance_from_no_difference(gate, floor.unit)
    if fineness >= floor.value:
        return None
    return (
        f"finer than the noise floor: the limit is {fineness:.4g} {floor.unit} from no difference, "
        f"and the reference differs from itself by {floor.value:.4g} {floor.unit} ({floor.note})"
    )


def _distance_from_no_difference(gate: Gate, unit: str) -> float:
    name = parse_metric(gate.metric)
    is_one = name.statistic == "ratio" or name.stem in _SHARES_OF_AGREEMENT
    neutral = 1.0 if is_one else 0.0
    return abs(gate.limit.to(unit) - neutral)
