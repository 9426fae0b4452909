"""The main job: build, serve, measure, judge, one readable function.

What each stage writes is on disk before the next one starts, so an interrupted release goes on
where it stopped, and judging can be done again anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quantgate.audit.judgement import JudgedAudit, judge_audits
from quantgate.audit.stage import AuditResult, audit_variants
from quantgate.candidates import build_candidates
from quantgate.champion import Champion, find_champion
from quantgate.errors import MeasurementError, UsageError
from quantgate.files import write_bytes, write_json
from quantgate.load.stage import CHAMPION_ARM, Arm, measure_load, workload_digests
from quantgate.load.workload import BlockWorkload, make_block_workload
from quantgate.machine import describe_machine
from quantgate.measurements_file import (
    MeasurementSet,
    VariantMeasurements,
    read_measurements,
    write_measurements,
)
from quantgate.plan import Plan, ReleaseRequest, make_plan
from quantgate.policy import Policy, required_gates
from quantgate.preflight import check_variants
from quantgate.progress import Progress
from quantgate.quality.evidence import measure_evidence
from quantgate.quality.lock import lock_sha256
from quantgate.quality.overlap import find_overlap
from quantgate.quality.rendering import Renderer
from quantgate.reduce import VariantEvidence, reduce_variant
from quantgate.release_folder import (
    JUDGED,
    MEASURED,
    ReleaseFolder,
    claimed,
    open_release,
    store_of,
    timestamp,
)
from quantgate.server_pool import ServerPool
from quantgate.variants.build import Variant
from quantgate.variants.scheme import CALIBRATED_SCHEMES
from quantgate.verdict import Decision, judge_release
from quantgate.verdicts_file import ReleaseVerdicts, collect_verdicts, write_verdicts


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseResult:
    """A judged release."""

    folder: ReleaseFolder
    verdicts: ReleaseVerdicts
    decisions: tuple[Decision, ...]


def run_release(request: ReleaseRequest, progress: Progress) -> ReleaseResult:
    """Builds, measures and judges every variant of a policy.

    Raises:
        UsageError: the policy, the model or a golden set cannot be used; nothing was run.
        ArtifactError: an artifact's bytes changed.
        MeasurementError: a baseline could not be built, so nothing can be compared.
    """
    return judge_stored(measure_release(request, progress))


def measure_release(request: ReleaseRequest, progress: Progress) -> ReleaseFolder:
    """Everything up to measurements.json; see `run_release`."""
    plan = make_plan(request)
    release = open_release(plan.runs, plan.policy, plan.identity())
    with claimed(release):
        _measure(plan, release, request.serving_config, progress)
    return release


def _measure(plan: Plan, release: ReleaseFolder, serving_config: Path, progress: Progress) -> None:
    release.update_state(
        machine=describe_machine(),
        source={"name": plan.source.name, "sha256": plan.source.sha256},
        golden_sets={g.name: lock_sha256(g.folder) for g in plan.all_sets},
        server_options=plan.server.arguments(),
    )
    preflight = check_variants(plan)
    release.update_state(preflight={one.variant: asdict(one) for one in preflight})
    variants, failures = build_candidates(plan, progress, preflight)
    release.update_state(
        build_failures=failures,
        variants={
            name: {
                "folder": _relative(variant.folder, plan.runs),
                "scheme": variant.manifest.scheme,
                "artifact_sha256": variant.manifest.artifact_sha256,
            }
            for name, variant in variants.items()
        },
    )
    audits = _audit(plan, variants, release.path / "audit.log", progress)
    for name, path in audits.reports.items():
        write_bytes(release.audit(name), path.read_bytes())
    champion = find_champion(plan.policy, plan.source, variants, serving_config)
    with ServerPool(plan.server, keeps_running=plan.device == "cpu") as servers:
        quality = measure_evidence(plan, release, variants, servers, progress)
        release.update_state(quality_seconds=quality.seconds)
        load = _measure_load(plan, release, variants, champion, servers, progress)
    measured = {
        name: VariantMeasurements(
            variant=name,
            scheme=plan.policy.variants[name].scheme,
            artifact_sha256=variant.manifest.artifact_sha256,
            measurements=reduce_variant(
                VariantEvidence(
                    name=name,
                    is_calibrated=plan.policy.variants[name].scheme in CALIBRATED_SCHEMES,
                    audit_failure=audits.failures.get(name),
                    golden_sets=plan.golden_sets,
                    reference_name=plan.policy.reference,
                    reference=quality.answers[plan.policy.reference],
                    candidate=quality.answers[name],
                    overlap=_overlap(plan, variant),
                    distribution_failure=quality.distribution_failures.get(name),
                    served_failure=quality.served_failures.get(name),
                    noise=quality.noise,
                    load_failure=_load_failure(load, name, variant.folder == champion.folder),
                    is_champion=variant.folder == champion.folder,
                    num_blocks=plan.policy.workload.blocks if plan.policy.workload else 0,
                ),
                release,
            ),
        )
        for name, variant in variants.items()
    }
    write_measurements(
        release.measurements,
        MeasurementSet(
            release_id=release.release_id,
            policy_sha256=plan.policy.sha256,
            reference=plan.policy.reference,
            champion=champion.name,
            variants=measured,
            noise_floors=quality.noise_floors,
        ),
    )
    release.update_state(stage=MEASURED, measured_at=timestamp(), judged_variants=list(plan.names))


def build_variants(request: ReleaseRequest, progress: Progress) -> dict[str, Variant]:
    """Builds a policy's variants, or finds them built.

    Raises:
        MeasurementError: one could not be built.
    """
    plan = make_plan(request)
    variants, failures = build_candidates(plan, progress, check_variants(plan))
    if failures:
        raise MeasurementError("\n".join(f"{name}: {why}" for name, why in failures.items()))
    return variants


def audit_variants_of(request: ReleaseRequest, progress: Progress) -> list[JudgedAudit]:
    """Builds a policy's variants, or finds them built, audits them and judges the audit gates.

    Raises:
        MeasurementError: one could not be built.
    """
    plan = make_plan(request)
    variants, failures = build_candidates(plan, progress, check_variants(plan))
    if failures:
        raise MeasurementError("\n".join(f"{name}: {why}" for name, why in failures.items()))
    return judge_audits(plan.policy, _audit(plan, variants, plan.runs / "audit.log", progress))


def judge_stored(
    release: ReleaseFolder, *, policy: Policy | None = None, variants: Sequence[str] | None = None
) -> ReleaseResult:
    """Judges what a release measured, and writes verdicts.json; needs no model and no torch.

    Args:
        policy: another policy than the one measured for; verdicts.json is then left as it is, since
            promotion follows the release's own policy.
        variants: None for those the release was asked to judge; of another policy, those of them
            that it has.

    Raises:
        UsageError: the other policy has none of them.
        ArtifactError: the measurements cannot be read, or the release's own policy was edited.
    """
    measurements = read_measurements(release.measurements)
    own = release.own_policy(measurements)
    names = tuple(variants or release.read_state().get("judged_variants") or own.variants)
    if policy is not None:
        asked, names = names, tuple(name for name in names if name in policy.variants)
        if not names:
            raise UsageError(
                f"{policy.path}: judges {', '.join(policy.variants)}; the release measured "
                f"{', '.join(asked)}."
            )
    decisions = judge_release(policy or own, measurements, variants=names)
    verdicts = collect_verdicts(policy or own, measurements, decisions)
    if policy is None and variants is None:
        write_verdicts(release.verdicts, verdicts)
        if release.read_state()["stage"] == MEASURED:
            release.update_state(stage=JUDGED)
    return ReleaseResult(folder=release, verdicts=verdicts, decisions=decisions)


def _audit(plan: Plan, variants: dict[str, Variant], log: Path, progress: Progress) -> AuditResult:
    """Compares every stored weight with the source's."""
    progress.stage("audit", len(variants))
    result = audit_variants(
        plan.source,
        variants,
        store=store_of(plan.runs) / "results",
        log=log,
        on_done=lambda note: progress.step(note=note),
    )
    for name, reason in result.failures.items():
        progress.note(f"{name}: {reason}")
    return result


def _measure_load(
    plan: Plan,
    release: ReleaseFolder,
    variants: dict[str, Variant],
    champion: Champion,
    servers: ServerPool,
    progress: Progress,
) -> dict[str, str]:
    """Paired blocks of every variant against the champion; returns failures by variant."""
    workload = plan.policy.workload
    if workload is None:
        return {}
    workloads = _workloads(plan)
    write_json(release.load / "workload.json", workload_digests(workloads))
    # The champion shares the server of the variant it is, unless the two are compared.
    shared = [
        name
        for name, variant in variants.items()
        if variant.folder == champion.folder and not _is_compared(plan.policy, name)
    ]
    log = release.log(shared[0]) if shared else release.load / "champion.log"
    candidates = [
        Arm(
            name=name,
            folder=variant.folder,
            log=release.log(name),
            artifact_sha256=variant.manifest.artifact_sha256,
        )
        for name, variant in variants.items()
        if name not in shared
    ]
    progress.stage("load", workload.blocks * (len(candidates) + 1))
    return measure_load(
        Arm(
            name=champion.name,
            folder=champion.folder,
            log=log,
            artifact_sha256=champion.artifact_sha256,
        ),
        candidates,
        workloads,
        folder=release.load,
        # On a GPU two models with equal KV budgets stay resident; on a CPU all of them.
        arms_together=None if plan.device == "cpu" else 2,
        servers=servers,
        warmup_requests=workload.warmup_requests,
        timeout_s=plan.timeout_s,
        on_block=lambda arm, block: progress.step(note=f"round {block + 1}, {arm}"),
    )


def _load_failure(failures: dict[str, str], name: str, is_champion: bool) -> str | None:
    """The champion's own server may have died where it has no arm under its own name."""
    return failures.get(name) or (failures.get(CHAMPION_ARM) if is_champion else None)


def _is_compared(policy: Policy, variant: str) -> bool:
    """A champion that is compared with itself needs a server of its own: an A/A measurement."""
    return any(gate.test == "ratio" for gate in required_gates(policy, variant))


def _workloads(plan: Plan) -> list[BlockWorkload]:
    workload = plan.policy.workload
    if workload is None:
        return []
    renderer = Renderer(plan.source.folder)
    prompts = [prompt.ids for golden in plan.all_sets for prompt in renderer.render(golden)]
    if not prompts:
        raise UsageError(
            "workload: prompts are cut from the golden sets, and the policy names none; "
            "add golden_sets or distribution."
        )
    return [
        make_block_workload(
            prompts,
            seed=workload.seed,
            block=block,
            burst_requests=workload.burst_requests,
            steady_requests=workload.requests,
            rate_rps=workload.rate.to("req/s"),
            prompt_tokens=workload.prompt_tokens,
            output_tokens=workload.output_tokens,
        )
        for block in range(workload.blocks)
    ]


def _overlap(plan: Plan, variant: Variant) -> str | None:
    """Why golden results of this variant prove nothing: it was calibrated on them."""
    if variant.manifest.calibration is None or plan.calibration is None:
        return None
    return find_overlap(plan.calibration.texts, plan.all_sets)


def _relative(folder: Path, runs: Path) -> str:
    root = runs.resolve().parent
    folder = folder.resolve()
    return str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
