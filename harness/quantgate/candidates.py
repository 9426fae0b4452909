"""The variants of a policy: built, found built, or brought by somebody; two at a time on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantgate.errors import MeasurementError
from quantgate.plan import Plan, project_folders
from quantgate.policy import SOURCE
from quantgate.preflight import Preflight
from quantgate.progress import Progress
from quantgate.release_folder import store_of
from quantgate.variants.build import Variant, adopt_variant, build_variant


def build_candidates(
    plan: Plan, progress: Progress, preflight: Sequence[Preflight]
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Builds or adopts each variant; one that cannot be built is INVALID, not the end.

    Returns:
        The variants, and for each of the others why it is not there.

    Raises:
        MeasurementError: the reference is among the others.
        ArtifactError: an artifact's bytes changed.
    """
    refused = {one.variant: "; ".join(one.problems) for one in preflight if one.problems}
    for one in preflight:
        if one.overlap:
            progress.note(f"{one.variant}: {one.overlap}")
    names = list(plan.names)
    for baseline in (plan.policy.champion, plan.policy.reference):
        # A baseline is built also when only others are asked for.
        if baseline != SOURCE and baseline not in names:
            names.append(baseline)
    progress.stage("build", len(names))
    variants: dict[str, Variant] = {}
    failures: dict[str, str] = {}
    # On a CPU a build is mostly imports and one busy core.
    with ThreadPoolExecutor(max_workers=2 if plan.device == "cpu" else 1) as pool:
        built = {name: pool.submit(_build_one, plan, name, refused.get(name)) for name in names}
        for name, future in built.items():
            try:
                variants[name] = future.result()
            except MeasurementError as error:
                failures[name] = str(error)
                progress.note(f"{name}: {error}")
                progress.step(note=f"{name} failed")
            else:
                how = "reused" if variants[name].is_reused else "built"
                progress.step(note=f"{name} {how}")
    if plan.policy.reference in failures:
        raise MeasurementError(
            f"the reference {plan.policy.reference} could not be built, so there is nothing to "
            f"compare quality with: {failures[plan.policy.reference]}"
        )
    return variants, failures


def _build_one(plan: Plan, name: str, refused: str | None) -> Variant:
    if refused:
        raise MeasurementError(f"not built: {refused}.")
    spec = plan.policy.variants[name]
    if spec.path is not None:
        folder = next(
            (b / spec.path for b in project_folders(plan.policy) if (b / spec.path).is_dir()), None
        )
        return adopt_variant(folder or Path(spec.path), name=name, scheme=spec.scheme)
    group = {"group_size": spec.group_size} if spec.group_size else {}
    return build_variant(
        plan.source,
        name=name,
        scheme=spec.scheme,
        options=spec.options | group,
        device=plan.device,
        calibration=plan.calibration,
        store=store_of(plan.runs) / "variants",
    )
