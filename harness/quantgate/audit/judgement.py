"""The audit gates of a policy on what an audit measured, before and apart from any release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantgate.audit.report import missing_audit, read_report, reduce_audit
from quantgate.audit.stage import AuditResult
from quantgate.measure import Measurement
from quantgate.policy import SOURCE, Policy, required_gates
from quantgate.units import parse_metric
from quantgate.variants.scheme import CALIBRATED_SCHEMES
from quantgate.verdict import Verdict, judge


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedAudit:
    """One variant's audit: everything measured, and the verdict of each gate that asks."""

    variant: str
    report: Path | None
    """None where the artifact could not be audited."""
    measurements: Sequence[Measurement]
    verdicts: Sequence[Verdict]


def judge_audits(policy: Policy, result: AuditResult) -> list[JudgedAudit]:
    """Judges each audited variant by the policy's gates on `audit/…` metrics."""
    judged = []
    for name in (*result.reports, *result.failures):
        path = result.reports.get(name)
        if path is not None:
            measured = reduce_audit(read_report(path), source=str(path))
        else:
            scheme = policy.variants[name].scheme
            measured = missing_audit(scheme in CALIBRATED_SCHEMES, result.failures[name])
        judged.append(
            JudgedAudit(
                variant=name,
                report=path,
                measurements=measured,
                verdicts=_judge(policy, name, {m.metric: m for m in measured}),
            )
        )
    return judged


def _judge(
    policy: Policy, variant: str, measured: Mapping[str, Measurement]
) -> tuple[Verdict, ...]:
    return tuple(
        judge(gate, measured.get(gate.metric), variant=variant, baseline=SOURCE)
        for gate in required_gates(policy, variant)
        if parse_metric(gate.metric).section == "audit"
    )
