"""Planting one fault into one variant: a damaged model to judge, or a refusal before any gate."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from quantgate.drill.artifact import MutableArtifact, NotApplicable
from quantgate.drill.fault import (
    AnyFault,
    ArtifactFault,
    CalibrationFault,
    GoldenFault,
    GroupSizeFault,
    ServingFault,
    SwappedFault,
)
from quantgate.errors import ArtifactError, GoldenSetError, MeasurementError, UsageError
from quantgate.plan import Plan
from quantgate.preflight import check_variants
from quantgate.quality.golden import GoldenSet, load_golden_set
from quantgate.quality.lock import changes_since_lock, read_lock
from quantgate.quality.rendering import Renderer
from quantgate.release_folder import store_of
from quantgate.variants.build import Variant, adopt_variant, build_variant
from quantgate.variants.manifest import write_manifest


class Refused(Exception):
    """The pipeline refused the fault before any gate was judged; the message is what it said."""

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(message)
        self.layer = layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A damaged variant, in the name of the sound one."""

    variant: Variant
    golden_sets: tuple[GoldenSet, ...] = ()
    """What it is asked in place of the policy's golden sets; empty for those themselves."""


def plant(fault: AnyFault, sound: Variant, plan: Plan, *, folder: Path) -> Planted:
    """Plants a fault.

    Args:
        folder: where the mutant goes; must not exist.

    Raises:
        NotApplicable: the variant has nothing to plant it in.
        Refused: the pipeline did not let it come to a gate.
    """
    match fault:
        case ArtifactFault():
            return _damaged(fault, sound, plan, folder)
        case SwappedFault():
            return _swapped(fault, sound, plan, folder)
        case ServingFault():
            # A copy, so that the fault is planted in this model and not in the sound one.
            artifact = MutableArtifact(sound, folder, plan.source)
            return Planted(variant=artifact.variant())
        case GoldenFault():
            return _edited_golden_sets(fault, sound, plan, folder)
        case CalibrationFault():
            return _calibrated_otherwise(fault, sound, plan)
        case GroupSizeFault():
            return _grouped_otherwise(fault, sound, plan)


def _damaged(fault: ArtifactFault, sound: Variant, plan: Plan, folder: Path) -> Planted:
    artifact = MutableArtifact(sound, folder, plan.source)
    fault.plant(artifact)
    mutant = artifact.variant()
    if fault.is_harmful and mutant.manifest.files == sound.manifest.files:
        raise NotApplicable("planting it changed no byte")
    return Planted(variant=mutant)


def _swapped(fault: SwappedFault, sound: Variant, plan: Plan, folder: Path) -> Planted:
    artifact = MutableArtifact(sound, folder, plan.source)
    fault.plant(artifact)
    write_manifest(folder, sound.manifest)
    try:
        variant = adopt_variant(folder, name=sound.name, scheme=sound.manifest.scheme)
    except ArtifactError as error:
        raise Refused("digest", str(error).replace(f"{folder}: ", "")) from error
    return Planted(variant=variant)


def _edited_golden_sets(fault: GoldenFault, sound: Variant, plan: Plan, folder: Path) -> Planted:
    if not plan.golden_sets:
        raise NotApplicable("the policy names no golden set")
    renderer = Renderer(sound.folder)
    edited = []
    for original in plan.golden_sets:
        copy = folder / original.name
        shutil.copytree(original.folder, copy)
        fault.plant(copy)
        try:
            golden = load_golden_set(copy)
            rendered = renderer.describe(golden, renderer.render(golden))
            changes = changes_since_lock(golden, rendered, read_lock(copy))
        except GoldenSetError as error:
            raise Refused("lock", str(error)) from error
        if changes:
            raise Refused("lock", f"{golden.name} differs from its lock in {', '.join(changes)}")
        edited.append(golden)
    return Planted(variant=sound, golden_sets=tuple(edited))


def _calibrated_otherwise(fault: CalibrationFault, sound: Variant, plan: Plan) -> Planted:
    spec = plan.policy.variants[sound.name]
    if plan.calibration is None or spec.path is not None:
        raise NotApplicable("the policy does not calibrate it")
    if fault.is_golden:
        texts = [
            message["content"] if item.messages else item.text or ""
            for golden in plan.golden_sets
            for item in golden.items
            for message in (item.messages or ({"content": ""},))
        ]
        leaking = replace(plan, calibration=replace(plan.calibration, texts=texts))
        overlap = next(p.overlap for p in check_variants(leaking) if p.variant == sound.name)
        if overlap:
            raise Refused("preflight", overlap)
        return Planted(variant=sound)
    group = {"group_size": spec.group_size} if spec.group_size else {}
    try:
        variant = build_variant(
            plan.source,
            name=sound.name,
            scheme=spec.scheme,
            options=spec.options | group,
            device=plan.device,
            calibration=fault.change(plan.calibration),
            store=store_of(plan.runs) / "variants",
        )
    except (UsageError, MeasurementError) as error:
        raise Refused("build", str(error)) from error
    return Planted(variant=variant)


def _grouped_otherwise(fault: GroupSizeFault, sound: Variant, plan: Plan) -> Planted:
    spec = plan.policy.variants[sound.name].model_copy(update={"group_size": fault.group_size})
    policy = plan.policy.model_copy(update={"variants": plan.policy.variants | {sound.name: spec}})
    found = next(
        one for one in check_variants(replace(plan, policy=policy)) if one.variant == sound.name
    )
    if found.problems:
        raise Refused("preflight", "; ".join(found.problems))
    return Planted(variant=sound)
