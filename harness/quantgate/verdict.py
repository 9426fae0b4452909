"""From a gate and a measurement to a verdict, and from verdicts to the decision about a variant.

One rule for every test: PASS when the whole interval is on the good side of the limit, FAIL when
it is on the bad side, otherwise INCONCLUSIVE with the n that would decide it. Absence never passes:
what is missing, of the wrong kind or too little is INVALID, and a variant is approved only by
exactly the verdicts that its policy requires.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from quantgate.finding import Finding, NoFinding, find
from quantgate.gate import Gate, TestName
from quantgate.measure import Measurement, Missing
from quantgate.measurements_file import MeasurementSet
from quantgate.policy import SOURCE, Policy, required_gates
from quantgate.resolution import why_too_fine
from quantgate.units import convert, parse_metric

_ROUNDING = 1e-9
"""Shares of items that cancel leave this much and less, in percent."""


class Outcome(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    INVALID = "INVALID"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One variant × gate, decided. All values are in `unit`, in which the limit is written."""

    variant: str
    gate_id: str
    metric: str
    test: TestName
    outcome: Outcome
    estimate: float | None
    """None without a finding, or where the percentile falls on a failed request."""
    lower: float | None
    upper: float | None
    """None without a finding, or where no finite value bounds the percentile."""
    limit: float
    direction: Literal["max", "min"]
    """Whether `limit` is the largest or the smallest acceptable value."""
    unit: str
    n: int
    n_required: int | None
    """Only for INCONCLUSIVE: samples that would decide if the estimate held; None if none would."""
    smallest_detectable_effect: float | None
    """The true change found in four of five repetitions; None where the test has no such notion."""
    confidence: float
    """Of each tail of the interval."""
    baseline: str | None
    """The variant (or "source") it is relative to; None for an absolute gate."""
    source: str | None
    """The file to recompute it from, relative to the release folder; None when there is none."""
    reason: str

    def line(self) -> str:
        """The verdict as one printed line."""
        head = f"{self.outcome:<12} {self.variant} {self.gate_id}  {self.metric}"
        if self.outcome is Outcome.INVALID:
            return "  ".join([head, self.reason, *([self.source] if self.source else [])])
        return f"{head}  {self.comparison()}  ({self._details()})  {self.source}"

    def comparison(self) -> str:
        """Observed and limit in one unit, as "0.08 nats > 0.06 nats"."""
        good, bad = ("<=", ">") if self.direction == "max" else (">=", "<")
        sign = {Outcome.PASS: good, Outcome.FAIL: bad}.get(self.outcome, f"against {good}")
        return f"{self.observed()} {sign} {self._number(self.limit)} {self.unit}"

    def observed(self) -> str:
        """The estimate with its unit, or a dash for INVALID."""
        if self.outcome is Outcome.INVALID:
            return "–"
        if self.estimate is None:
            return "infinite"
        return f"{self._number(self.estimate)} {self.unit}"

    def allowed(self) -> str:
        """The limit with its direction and unit."""
        sign = "<=" if self.direction == "max" else ">="
        return f"{sign} {self._number(self.limit)} {self.unit}"

    def bounds(self) -> str:
        """The interval; a dash where the verdict has none because it needs none."""
        if self.outcome is Outcome.INVALID or self.test == "limit":
            return "–"
        lower, upper = (
            "infinite" if bound is None else self._number(bound)
            for bound in (self.lower, self.upper)
        )
        return f"{lower} .. {upper}"

    def needed(self) -> str:
        """What would decide an INCONCLUSIVE verdict, if the estimate held."""
        return "no n decides" if self.n_required is None else f"n={self.n_required:,} would decide"

    def _details(self) -> str:
        parts = [f"n={self.n:,}"]
        if self.test != "limit":
            parts.append(f"{100 * self.confidence:.6g}% bounds {self.bounds()}")
        if self.outcome is Outcome.INCONCLUSIVE:
            parts.append(self.needed())
        if self.smallest_detectable_effect is not None:
            parts.append(f"detects {self._number(self.smallest_detectable_effect)} {self.unit}")
        if self.baseline is not None:
            parts.append(f"baseline {self.baseline}")
        if self.reason:
            parts.append(self.reason)
        return "; ".join(parts)

    def _number(self, value: float) -> str:
        if abs(value) >= 10_000:
            return f"{value:,.0f}"
        if self.unit in ("pt", "%") and abs(value) < _ROUNDING:
            return "0"
        # A perplexity ratio of 1.0004 is not 1.
        return f"{value:.5g}" if self.unit == "x" else f"{value:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """May this variant be promoted? Derived from its verdicts, so that the two cannot disagree."""

    variant: str
    verdicts: tuple[Verdict, ...]
    problems: tuple[str, ...] = ()
    """How the set of verdicts differs from the set that the policy requires."""

    @property
    def approved(self) -> bool:
        return bool(self.verdicts) and not self.reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not approved; empty when it is."""
        failing = (
            f"{verdict.gate_id} is {verdict.outcome}"
            for verdict in self.verdicts
            if verdict.outcome is not Outcome.PASS
        )
        return (*self.problems, *failing)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """For `exit_code`: a set that is not the required one counts as INVALID."""
        outcomes = tuple(verdict.outcome for verdict in self.verdicts)
        return (*outcomes, Outcome.INVALID) if self.problems or not outcomes else outcomes


def judge(
    gate: Gate, measurement: Measurement | None, *, variant: str, baseline: str | None
) -> Verdict:
    """Judge one gate; None means that the metric is not among the measurements.

    Args:
        baseline: what the measurement was taken against; None for an absolute metric.
    """
    if measurement is None:
        return _invalid(gate, variant, baseline, reason="not measured", n=0, source=None)
    source = measurement.source
    if measurement.metric != gate.metric:
        reason = f"wrong measurement: {measurement.metric}"
        return _invalid(gate, variant, baseline, reason=reason, n=0, source=source)
    if isinstance(measurement, Missing):
        reason = f"not measured: {measurement.reason}"
        return _invalid(gate, variant, baseline, reason=reason, n=0, source=source)
    found = find(gate, measurement)
    if isinstance(found, NoFinding):
        return _invalid(gate, variant, baseline, reason=found.reason, n=found.n, source=source)
    return _decided(gate, found, variant=variant, baseline=baseline, source=source)


def judge_release(
    policy: Policy, measurements: MeasurementSet, *, variants: Sequence[str] | None = None
) -> tuple[Decision, ...]:
    """Decide every variant of the policy (or the named ones), measured or not.

    The policy need not be the one that was measured for, but what it calls its reference must be
    what quality was measured against. The champion is whatever was serving, so the measurements
    name it.
    """
    decisions = []
    for variant in policy.variants if variants is None else variants:
        verdicts = [
            _judge_stored(gate, policy, measurements, variant=variant)
            for gate in required_gates(policy, variant)
        ]
        decisions.append(decide(policy, variant, verdicts))
    return tuple(decisions)


def decide(policy: Policy, variant: str, verdicts: Iterable[Verdict]) -> Decision:
    """Approve only if the verdicts are exactly the required ones and every one is PASS."""
    verdicts = tuple(verdicts)
    required = {gate.id: gate for gate in required_gates(policy, variant)}
    counts = Counter(verdict.gate_id for verdict in verdicts)
    problems = [f"no verdict for gate {gate_id}" for gate_id in required if not counts[gate_id]]
    problems += [f"{n} verdicts for gate {gate_id}" for gate_id, n in counts.items() if n > 1]
    for verdict in verdicts:
        gate = required.get(verdict.gate_id)
        if gate is None:
            problems.append(f"gate {verdict.gate_id} is not required of {variant}")
        elif verdict.variant != variant:
            problems.append(f"the verdict of {verdict.gate_id} is about {verdict.variant}")
        elif not _is_under(verdict, gate):
            problems.append(f"{verdict.gate_id} was judged under another rule")
    return Decision(variant=variant, verdicts=verdicts, problems=tuple(problems))


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """0 all pass · 1 a gate failed · 3 INVALID · 4 INCONCLUSIVE; no outcome at all is INVALID."""
    found = set(outcomes) or {Outcome.INVALID}
    for outcome, code in ((Outcome.FAIL, 1), (Outcome.INVALID, 3), (Outcome.INCONCLUSIVE, 4)):
        if outcome in found:
            return code
    return 0


def baseline_of(metric: str, *, reference: str, champion: str) -> str | None:
    """What a metric is relative to: weights to the source's, quality to the reference, speed ratios
    to the champion."""
    name = parse_metric(metric)
    if name.section == "audit":
        return SOURCE
    if name.section in ("quality", "validity"):
        return reference
    return champion if name.section == "perf" and name.statistic == "ratio" else None


def _judge_stored(
    gate: Gate, policy: Policy, measurements: MeasurementSet, *, variant: str
) -> Verdict:
    baseline = baseline_of(
        gate.metric, reference=measurements.reference, champion=measurements.champion
    )
    measured = measurements.variants.get(variant)
    if measured is None:
        reason = "not measured: the release does not have this variant"
        return _invalid(gate, variant, baseline, reason=reason, n=0, source=None)
    measurement = measured.measurements.get(gate.metric)
    source = None if measurement is None else measurement.source
    if measured.scheme != policy.variants[variant].scheme:
        reason = (
            f"measured on scheme {measured.scheme}, the policy says "
            f"{policy.variants[variant].scheme}"
        )
        return _invalid(gate, variant, baseline, reason=reason, n=0, source=source)
    wanted = baseline_of(gate.metric, reference=policy.reference, champion=measurements.champion)
    if wanted != baseline:
        reason = f"measured against {baseline}, the policy's reference is {wanted}"
        return _invalid(gate, variant, baseline, reason=reason, n=0, source=source)
    verdict = judge(gate, measurement, variant=variant, baseline=baseline)
    too_fine = why_too_fine(gate, measurements.noise_floors)
    if verdict.outcome is Outcome.INVALID or too_fine is None:
        return verdict
    return _invalid(gate, variant, baseline, reason=too_fine, n=verdict.n, source=source)


def _outcome(gate: Gate, found: Finding) -> Outcome:
    """The shared rule. A value exactly at the limit is on its good side."""
    interval, limit = found.interval, found.limit
    if gate.direction == "max":
        passed, failed = interval.upper <= limit, interval.lower > limit
    else:
        passed, failed = interval.lower >= limit, interval.upper < limit
    if gate.test == "non_inferiority":
        # A drop that is shown, and whose best estimate is unacceptable, needs no more samples.
        failed = failed or (interval.upper < 0 and interval.estimate < limit)
    if passed:
        return Outcome.PASS
    return Outcome.FAIL if failed else Outcome.INCONCLUSIVE


def _decided(
    gate: Gate, found: Finding, *, variant: str, baseline: str | None, source: str | None
) -> Verdict:
    outcome = _outcome(gate, found)
    n_required = found.n_required if outcome is Outcome.INCONCLUSIVE else None
    if n_required is not None:
        # The plan uses a smoother interval than the judgement; it never says "what you have".
        n_required = max(n_required, found.n + 1)
    limit = gate.limit

    def written(value: float | None) -> float | None:
        if value is None or math.isinf(value):
            return None
        return convert(value, found.unit, to=limit.unit)

    return Verdict(
        variant=variant,
        gate_id=gate.id,
        metric=gate.metric,
        test=gate.test,
        outcome=outcome,
        estimate=written(found.interval.estimate),
        lower=written(found.interval.lower),
        upper=written(found.interval.upper),
        limit=limit.value,
        direction=gate.direction,
        unit=limit.unit,
        n=found.n,
        n_required=n_required,
        smallest_detectable_effect=written(found.smallest_detectable_effect),
        confidence=gate.confidence,
        baseline=baseline,
        source=source,
        reason=found.reason,
    )


def _invalid(
    gate: Gate, variant: str, baseline: str | None, *, reason: str, n: int, source: str | None
) -> Verdict:
    return Verdict(
        variant=variant,
        gate_id=gate.id,
        metric=gate.metric,
        test=gate.test,
        outcome=Outcome.INVALID,
        estimate=None,
        lower=None,
        upper=None,
        limit=gate.limit.value,
        direction=gate.direction,
        unit=gate.limit.unit,
        n=n,
        n_required=None,
        smallest_detectable_effect=None,
        confidence=gate.confidence,
        baseline=baseline,
        source=source,
        reason=reason,
    )


def _is_under(verdict: Verdict, gate: Gate) -> bool:
    """The verdict answers the question that the gate asks now."""
    asked = (gate.metric, gate.test, gate.limit.value, gate.limit.unit, gate.direction)
    answered = (verdict.metric, verdict.test, verdict.limit, verdict.unit, verdict.direction)
    return asked == answered and verdict.confidence == gate.confidence
