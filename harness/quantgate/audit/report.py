"""audit.json: what the audit of one artifact found, and its reduction to measurements.

No torch here: judging reads this file on machines that have none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.errors import MeasurementError
from quantgate.files import read_json, write_json
from quantgate.measure import Measurement, Missing, Scalar

SCHEMA_VERSION = 1

METRICS = (
    "audit/weight_error.ratio",
    "audit/group_error.ratio",
    "audit/group_gain.ratio",
    "audit/weight_cosine.min",
    "audit/non_finite.count",
    "audit/constant_block.count",
    "audit/weight_bits.mean",
    "audit/coverage_difference.count",
    "audit/format_difference.count",
    "audit/config_difference.count",
    "audit/file_difference.count",
    "audit/vocabulary_difference.count",
)
CALIBRATED_METRICS = (
    "audit/rounded_module.count",
    "audit/calibration_tokens.count",
    "audit/calibration_surprise.ratio",
)
"""Measured for schemes that calibrate."""

ROUNDED_SHARE = 0.9995
"""A module with at least this share of weights on the nearest code was rounded, not calibrated.
GPTQ of the demo model stores 81 to 86 % of a module's weights on the nearest code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightAudit:
    """What one weight of the artifact is worth."""

    name: str
    shape: tuple[int, ...]
    is_quantized: bool
    num_bits: int
    relative_error: float | None
    """||stored - source|| / ||source||, Frobenius; None where a weight is not finite."""
    rounding_error: float | None
    """The same of a healthy quantizer of the scheme."""
    error_ratio: float | None
    """The first over the second."""
    group_ratio: float | None
    """The same ratio for the worst group of weights that share a scale."""
    worst_group: int | None
    group_gain: float | None
    """1 + |b - 1| of the group where it is largest, b being the factor that fits the source's
    weights to the stored ones best: a scale that is off by a factor shows here, however coarse the
    rounding."""
    worst_gain_group: int | None
    cosine: float | None
    num_groups: int
    num_non_finite: int
    """Groups that hold a weight that is not finite."""
    num_constant: int
    """Groups whose stored weights are all equal, and the source's are not."""
    nearest_share: float | None
    """Share of weights stored as the code nearest to the source's; None where codes are not equally
    spaced. Rounding alone gives 1, calibration less."""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """Everything the audit of one artifact found."""

    scheme: str
    artifact_sha256: str
    source_sha256: str
    is_calibrated: bool
    calibration_tokens: int | None
    """None where the artifact does not say what it was calibrated on."""
    calibration_surprise: float | None
    """The source's surprise at the calibration text over that at the same tokens in random order;
    None where the artifact does not say."""
    weights: tuple[WeightAudit, ...]
    bits_per_weight: float | None
    """Over all weights that the scheme should quantize; None where there is none."""
    coverage: tuple[str, ...] = ()
    """Weights quantized, left, missing or added otherwise than the scheme says."""
    formats: tuple[str, ...] = ()
    """Stored tensors that contradict the format or the declared settings."""
    configs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Tokenizer, chat template and generation config that differ from the source's."""
    vocabulary: tuple[str, ...] = ()
    source_bytes: int = 0
    """Read from the source."""
    seconds: float = 0.0


def write_report(path: Path, report: AuditReport) -> None:
    write_json(path, {"schema_version": SCHEMA_VERSION} | dataclasses.asdict(report))


def read_report(path: Path) -> AuditReport:
    """Reads audit.json.

    Raises:
        MeasurementError: missing, not JSON, or of another schema.
    """
    try:
        value: dict[str, Any] = read_json(path)
        if value.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"expected schema_version {SCHEMA_VERSION}")
        weights = tuple(
            WeightAudit(**one | {"shape": tuple(one["shape"]), "problems": tuple(one["problems"])})
            for one in value.pop("weights")
        )
        fields: dict[str, Any] = {
            key: tuple(field) if isinstance(field, list) else field for key, field in value.items()
        }
        return AuditReport(weights=weights, **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MeasurementError(f"{path}: not an audit ({error}). Run the audit again.") from error


def missing_audit(scheme_is_calibrated: bool, reason: str) -> list[Measurement]:
    """Every metric of an audit that could not be made."""
    names = (*METRICS, *(CALIBRATED_METRICS if scheme_is_calibrated else ()))
    return [Missing(metric=metric, reason=reason) for metric in names]


def reduce_audit(report: AuditReport, *, source: str) -> list[Measurement]:
    """The measurements of one audit; each says in its note which weight or file it is about."""
    weights = report.weights
    measured = [
        _worst_ratio("audit/weight_error.ratio", weights, "error_ratio", source),
        _worst_ratio("audit/group_error.ratio", weights, "group_ratio", source),
        _worst_ratio("audit/group_gain.ratio", weights, "group_gain", source),
        _lowest_cosine(weights, source),
        _sum_of("audit/non_finite.count", weights, "num_non_finite", source),
        _sum_of("audit/constant_block.count", weights, "num_constant", source),
        _bits(report, source),
        *(
            _count_of(f"audit/{noun}_difference.count", found, len(weights), source)
            for noun, found in (
                ("coverage", report.coverage),
                ("format", report.formats),
                ("config", report.configs),
                ("file", report.files),
                ("vocabulary", report.vocabulary),
            )
        ),
    ]
    if report.is_calibrated:
        measured += [
            _rounded(weights, source),
            _calibration(report, source),
            _surprise(report, source),
        ]
    return measured


def _worst_ratio(
    metric: str, weights: Sequence[WeightAudit], field: str, source: str
) -> Measurement:
    broken = next((weight for weight in weights if getattr(weight, field) is None), None)
    if broken is not None or not weights:
        reason = f"{broken.name} holds weights that are not finite" if broken else _NO_WEIGHTS
        return Missing(metric=metric, reason=reason, source=source)
    worst = max(weights, key=lambda weight: float(getattr(weight, field)))
    note = f"worst: {worst.name}"
    group = {"group_ratio": worst.worst_group, "group_gain": worst.worst_gain_group}.get(field)
    if group is not None:
        note += f", group {group} of {worst.num_groups}"
    value = float(getattr(worst, field))
    return Scalar(metric=metric, value=value, unit="x", n=len(weights), source=source, note=note)


def _lowest_cosine(weights: Sequence[WeightAudit], source: str) -> Measurement:
    metric = "audit/weight_cosine.min"
    known = [(weight.cosine, weight.name) for weight in weights if weight.cosine is not None]
    if len(known) < len(weights) or not known:
        reason = "a weight is not finite" if weights else _NO_WEIGHTS
        return Missing(metric=metric, reason=reason, source=source)
    value, name = min(known)
    note = f"worst: {name}"
    return Scalar(metric=metric, value=value, unit="1", n=len(known), source=source, note=note)


def _sum_of(metric: str, weights: Sequence[WeightAudit], field: str, source: str) -> Measurement:
    if not weights:
        return Missing(metric=metric, reason=_NO_WEIGHTS, source=source)
    found = [weight for weight in weights if getattr(weight, field)]
    total = sum(int(getattr(weight, field)) for weight in found)
    num_groups = sum(weight.num_groups for weight in weights)
    note = f"in {len(found)} weights, first {found[0].name}" if found else ""
    return Scalar(metric=metric, value=total, unit="count", n=num_groups, source=source, note=note)


def _bits(report: AuditReport, source: str) -> Measurement:
    metric = "audit/weight_bits.mean"
    if report.bits_per_weight is None:
        reason = "the model has no weight that the scheme would quantize"
        return Missing(metric=metric, reason=reason, source=source)
    return Scalar(
        metric=metric, value=report.bits_per_weight, unit="bit", n=len(report.weights),
        source=source,
    )  # fmt: skip


def _count_of(metric: str, found: Sequence[str], num_weights: int, source: str) -> Measurement:
    if not num_weights:
        return Missing(metric=metric, reason=_NO_WEIGHTS, source=source)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    note = f"{found[0]}{more}" if found else ""
    return Scalar(
        metric=metric, value=len(found), unit="count", n=num_weights, source=source, note=note
    )


def _rounded(weights: Sequence[WeightAudit], source: str) -> Measurement:
    metric = "audit/rounded_module.count"
    shares = [weight for weight in weights if weight.nearest_share is not None]
    if not shares:
        return Missing(metric=metric, reason="no calibrated weight was found", source=source)
    rounded = [weight for weight in shares if (weight.nearest_share or 0) >= ROUNDED_SHARE]
    note = f"first {rounded[0].name}" if rounded else ""
    return Scalar(
        metric=metric, value=len(rounded), unit="count", n=len(shares), source=source, note=note
    )


def _calibration(report: AuditReport, source: str) -> Measurement:
    metric = "audit/calibration_tokens.count"
    if report.calibration_tokens is None:
        reason = "the artifact does not say what it was calibrated on"
        return Missing(metric=metric, reason=reason, source=source)
    return Scalar(metric=metric, value=report.calibration_tokens, unit="count", n=1, source=source)


def _surprise(report: AuditReport, source: str) -> Measurement:
    metric = "audit/calibration_surprise.ratio"
    if report.calibration_surprise is None:
        reason = (
            "the artifact does not say how its source reads the calibration text; build it again"
        )
        return Missing(metric=metric, reason=reason, source=source)
    return Scalar(metric=metric, value=report.calibration_surprise, unit="x", n=1, source=source)


_NO_WEIGHTS = "no weight could be compared"
