"""The layers that judge mutants, cheap to dear: audit, distribution, served = offline, behaviour.

Each takes models by key and returns their measurements; a model that cannot be measured has Missing
ones, so that absence is judged and not skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quantgate.audit.report import missing_audit, read_report, reduce_audit
from quantgate.audit.stage import audit_variants
from quantgate.errors import MeasurementError, UsageError
from quantgate.gate import Gate
from quantgate.measure import Measurement, Missing
from quantgate.plan import Plan
from quantgate.policy import SOURCE, required_gates
from quantgate.quality.distribution import Candidate, Comparison, compare_with_reference
from quantgate.quality.distribution_results import METRICS, reduce_distribution
from quantgate.quality.distribution_store import group_size_of
from quantgate.quality.golden import GoldenSet
from quantgate.quality.noise_floor import METRICS as NOISE_METRICS
from quantgate.quality.rendering import RenderedPrompt, Renderer
from quantgate.quality.results import missing_golden_set, reduce_golden_set
from quantgate.quality.served import METRICS as SERVED_METRICS
from quantgate.quality.stage import QualityResult
from quantgate.units import parse_metric
from quantgate.variants.build import Variant
from quantgate.variants.scheme import CALIBRATED_SCHEMES
from quantgate.verdict import Verdict, judge

AUDIT, DISTRIBUTION, SERVED, BEHAVIOUR = "audit", "distribution", "served", "behaviour"
LAYERS = (AUDIT, DISTRIBUTION, SERVED, BEHAVIOUR)
_NOUNS = {
    DISTRIBUTION: {metric.split(".")[0] for metric in METRICS},
    SERVED: {metric.split(".")[0] for metric in (*SERVED_METRICS, *NOISE_METRICS)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model at one layer."""

    measurements: Sequence[Measurement]
    seconds: float


def layer_of(gate: Gate) -> str | None:
    """The layer that measures a gate's metric; None for what the drill does not measure."""
    name = parse_metric(gate.metric)
    if name.section == "audit":
        return AUDIT
    if name.is_golden_set:
        return BEHAVIOUR
    first = gate.metric.split(".")[0]
    return next((layer for layer, nouns in _NOUNS.items() if first in nouns), None)


def audit_layer(
    plan: Plan, models: Mapping[str, Variant], *, store: Path, log: Path
) -> dict[str, Measured]:
    """One child process for all models."""
    if not models:
        return {}
    result = audit_variants(plan.source, models, store=store, log=log, on_done=lambda _: None)
    measured = {}
    for key, variant in models.items():
        path = result.reports.get(key)
        if path is None:
            is_calibrated = variant.manifest.scheme in CALIBRATED_SCHEMES
            missing = missing_audit(is_calibrated, result.failures[key])
            measured[key] = Measured(measurements=missing, seconds=0.0)
        else:
            report = read_report(path)
            measured[key] = Measured(
                measurements=reduce_audit(report, source=path.name), seconds=report.seconds
            )
    return measured


def distribution_layer(
    plan: Plan,
    models: Mapping[str, Variant],
    *,
    reference: Path,
    out: Mapping[str, Path],
    log: Path,
    on_done: Callable[[str], None],
) -> dict[str, Measured]:
    """A child process for every model that is scored at a time; each loads the reference once.

    Args:
        out: the parquet of each model; one that is there already is not computed again.
        log: the folder of the processes' logs.
    """
    documents, max_tokens = scored_documents(plan, reference)
    comparison = Comparison(
        reference=reference,
        documents=documents,
        device=plan.device,
        dtype=plan.dtype,
        threads=plan.server.threads,
        max_tokens=max_tokens,
        max_context=plan.server.max_context,
    )
    seconds: dict[str, float] = {}

    def score(batch: Mapping[str, Candidate], number: int) -> dict[str, str]:
        clock = _Clock(seconds)

        def done(key: str) -> None:
            clock.lap(key)
            on_done(key)

        return compare_with_reference(
            comparison,
            batch,
            out=out,
            log=log / f"distribution-{number}.log",
            on_done=done,
        )

    wanted = {}
    for key, variant in models.items():
        if out[key].is_file():
            on_done(key)
        else:
            wanted[key] = _candidate(plan, variant)
    # Those of one scheme share their healthy twin, so they stay together as far as it goes.
    ordered = sorted(wanted, key=lambda key: (wanted[key].scheme, wanted[key].group_size))
    share = -(-len(ordered) // plan.models_together) or 1
    batches = [ordered[start : start + share] for start in range(0, len(ordered), share)]
    with ThreadPoolExecutor(max_workers=plan.models_together) as pool:
        found = pool.map(
            score, [{key: wanted[key] for key in batch} for batch in batches], range(len(batches))
        )
        failures = {key: why for one in found for key, why in one.items()}
    measured = {}
    for key in models:
        if key in failures:
            reason = "the model cannot be scored: " + failures[key].splitlines()[-1].strip()
            values: Sequence[Measurement] = [Missing(metric=m, reason=reason) for m in METRICS]
        else:
            values = reduce_distribution(out[key], source=out[key].name)
        measured[key] = Measured(measurements=values, seconds=seconds.get(key, 0.0))
    return measured


def _candidate(plan: Plan, variant: Variant) -> Candidate:
    return Candidate(
        folder=variant.folder,
        scheme=plan.policy.variants[variant.name].scheme,
        group_size=group_size_of(plan, variant.name, variant.folder),
    )


def scored_documents(plan: Plan, reference: Path) -> tuple[list[RenderedPrompt], int]:
    """The documents that have a token to predict, and how many tokens of each are scored.

    Raises:
        UsageError: the policy names no documents.
    """
    if plan.documents is None or plan.policy.distribution is None:
        raise UsageError("distribution gates need documents: name a golden set in the policy.")
    max_tokens = plan.policy.distribution.max_tokens
    rendered = Renderer(reference).render(plan.documents)
    return [one for one in rendered if min(len(one.ids), max_tokens) >= 2], max_tokens


def reduce_behaviour(
    sets: Sequence[GoldenSet], reference: QualityResult, candidate: QualityResult
) -> list[Measurement]:
    """Pairs a model's answers with the reference's, set by set."""
    measured: list[Measurement] = []
    for golden in sets:
        name = golden.name
        reason = reference.missing.get(name) or candidate.missing.get(name)
        if reason:
            measured += missing_golden_set(golden, reason)
            continue
        try:
            measured += reduce_golden_set(
                golden, reference.items[name], candidate.items[name], source=f"{name}.parquet"
            )
        except MeasurementError as error:
            measured += missing_golden_set(golden, str(error))
    return measured


def judge_layer(plan: Plan, layer: str, variant: str, measured: Measured) -> list[Verdict]:
    """What the policy's gates of one layer say; a metric that is not there is judged as missing."""
    by_metric = {m.metric: m for m in measured.measurements}
    baseline = SOURCE if layer == AUDIT else plan.policy.reference
    return [
        judge(gate, by_metric.get(gate.metric), variant=variant, baseline=baseline)
        for gate in required_gates(plan.policy, variant)
        if layer_of(gate) == layer
    ]


class _Clock:
    """Seconds from one mark to the next, by name."""

    def __init__(self, laps: dict[str, float]) -> None:
        self._laps = laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now
