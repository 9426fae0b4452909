"""From a variant's files to its measurements: every metric has a value or a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantgate.audit.report import missing_audit, read_report, reduce_audit
from quantgate.errors import MeasurementError
from quantgate.load.results import (
    ABSOLUTE_METRICS,
    RATIO_METRICS,
    ArmLoad,
    absolute_latency,
    compare_arms,
    read_arm,
)
from quantgate.load.stage import CHAMPION_ARM, find_arm, read_facts
from quantgate.measure import Binomial, Measurement, Missing, Scalar
from quantgate.quality import distribution_results
from quantgate.quality.golden import GoldenSet
from quantgate.quality.results import count_errors, missing_golden_set, reduce_golden_set
from quantgate.quality.served import missing_served, reduce_served
from quantgate.quality.stage import QualityResult
from quantgate.release_folder import ReleaseFolder

MEMORY_METRIC = "memory/peak_bytes.max"
OOM_METRIC = "stability/oom.count"
ERROR_METRIC = "stability/error.rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantEvidence:
    """What the stages say of one variant, beside the files they wrote."""

    name: str
    is_calibrated: bool
    """By its scheme."""
    audit_failure: str | None
    golden_sets: Sequence[GoldenSet]
    reference_name: str
    reference: QualityResult
    candidate: QualityResult
    overlap: str | None
    distribution_failure: str | None
    served_failure: str | None
    noise: Sequence[Measurement]
    """Of the reference against itself: the same for all variants."""
    load_failure: str | None
    is_champion: bool
    num_blocks: int


def reduce_variant(evidence: VariantEvidence, release: ReleaseFolder) -> Mapping[str, Measurement]:
    """All measurements of one variant, by metric."""
    measurements = [
        *_audit(evidence, release),
        *_quality(evidence, release),
        *_distribution(evidence, release),
        *_served(evidence, release),
        *evidence.noise,
        *_load(evidence, release),
    ]
    return {measurement.metric: measurement for measurement in measurements}


def _audit(evidence: VariantEvidence, release: ReleaseFolder) -> list[Measurement]:
    path = release.audit(evidence.name)
    try:
        if evidence.audit_failure:
            raise MeasurementError(evidence.audit_failure)
        report = read_report(path)
    except MeasurementError as error:
        return missing_audit(evidence.is_calibrated, str(error))
    return reduce_audit(report, source=_source(path, release))


def _quality(evidence: VariantEvidence, release: ReleaseFolder) -> list[Measurement]:
    measurements: list[Measurement] = []
    for golden in evidence.golden_sets:
        name = golden.name
        reason = (
            evidence.overlap
            or _about("the reference", evidence.reference.missing.get(name))
            or evidence.candidate.missing.get(name)
        )
        if reason:
            measurements += missing_golden_set(golden, reason)
            continue
        items = release.items(evidence.name, name)
        measurements += reduce_golden_set(
            golden, evidence.reference.items[name], items, source=_source(items, release)
        )
    return measurements


def _about(whom: str, reason: str | None) -> str | None:
    return f"{whom}: {reason}" if reason else None


def _distribution(evidence: VariantEvidence, release: ReleaseFolder) -> list[Measurement]:
    path = release.distribution(evidence.name)
    reason = evidence.overlap or evidence.distribution_failure
    if reason is None and not path.is_file():
        return []
    if reason:
        return [Missing(metric=metric, reason=reason) for metric in distribution_results.METRICS]
    return distribution_results.reduce_distribution(path, source=_source(path, release))


def _served(evidence: VariantEvidence, release: ReleaseFolder) -> list[Measurement]:
    """The server against offline scoring of the same variant: no matter what calibrated it."""
    distribution, served = release.distribution(evidence.name), release.served(evidence.name)
    reason = evidence.served_failure or evidence.distribution_failure
    if reason:
        return missing_served(reason)
    if not distribution.is_file() or not served.is_file():
        return []
    reference = release.served(evidence.reference_name)
    again = release.rerun(evidence.name, "served")
    try:
        return reduce_served(
            distribution,
            served,
            reference=reference if reference.is_file() else None,
            again=again if again.is_file() else None,
            source=_source(served, release),
        )
    except MeasurementError as error:
        return missing_served(str(error))


def _load(evidence: VariantEvidence, release: ReleaseFolder) -> list[Measurement]:
    if not evidence.num_blocks:
        return []
    everything = (*RATIO_METRICS, *ABSOLUTE_METRICS, MEMORY_METRIC, OOM_METRIC, ERROR_METRIC)
    found = find_arm(release.load, evidence.name, is_champion=evidence.is_champion)
    try:
        if evidence.load_failure or found is None:
            raise MeasurementError(evidence.load_failure or "the load stage was not run")
        champion = read_arm(found.group, CHAMPION_ARM, evidence.num_blocks)
        candidate = read_arm(found.group, found.arm, evidence.num_blocks)
        facts = read_facts(found.group, found.arm, evidence.num_blocks)
    except MeasurementError as error:
        return [Missing(metric=metric, reason=str(error)) for metric in everything]
    source = _source(found.group / found.arm, release)
    return [
        *_ratios(champion, candidate, source=source),
        absolute_latency(candidate, source=source),
        _memory(evidence, facts.peak_bytes, source=source),
        *_stability(evidence, release, candidate, facts.oom_count, source=source),
    ]


def _ratios(champion: ArmLoad, candidate: ArmLoad, *, source: str) -> list[Measurement]:
    if candidate.arm != CHAMPION_ARM:
        return compare_arms(champion, candidate, source=source)
    reason = "the variant is the champion, and was not measured beside itself"
    return [Missing(metric=metric, reason=reason, source=source) for metric in RATIO_METRICS]


def _memory(evidence: VariantEvidence, load_peak_bytes: int, *, source: str) -> Measurement:
    """The peak over both stages that talk to the server."""
    peak = max(load_peak_bytes, evidence.candidate.peak_bytes)
    return Scalar(metric=MEMORY_METRIC, value=peak, unit="B", n=1, source=source)


def _stability(
    evidence: VariantEvidence,
    release: ReleaseFolder,
    load: ArmLoad,
    load_ooms: int,
    *,
    source: str,
) -> list[Measurement]:
    """Errors and OOMs over both stages that talk to the server."""
    counted = [count_errors(release.items(evidence.name, n)) for n in evidence.candidate.items]
    num_errors = load.num_errors + sum(errors for errors, _ in counted)
    num_requests = load.num_requests + sum(requests for _, requests in counted)
    errors = Binomial(metric=ERROR_METRIC, events=num_errors, trials=num_requests, source=source)
    if evidence.candidate.oom_count is None:
        reason = "the server ended while golden sets were asked, so its count is lost"
        return [errors, Missing(metric=OOM_METRIC, reason=reason)]
    ooms = load_ooms + evidence.candidate.oom_count
    return [
        errors,
        Scalar(metric=OOM_METRIC, value=ooms, unit="count", n=num_requests, source=source),
    ]


def _source(path: Path, release: ReleaseFolder) -> str:
    return release.relative(path)
