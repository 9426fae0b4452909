"""A drill from end to end: build, plant, run the gauntlet, write what became of each fault.

A gate catches a fault if it passes on the sound variant and fails, or is INVALID, on the damaged
one. A gate that does not pass on the sound variant can tell nothing, and is named.
"""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quantgate.candidates import build_candidates
from quantgate.drill.artifact import NotApplicable
from quantgate.drill.catalogue import catalogue
from quantgate.drill.fault import AnyFault
from quantgate.drill.gauntlet import Gauntlet
from quantgate.drill.planting import Refused, plant
from quantgate.drill.results import Caught, DrillResult, DrillRow, write_drill
from quantgate.drill.rows import refused_row, row_of
from quantgate.drill.trials import Trial
from quantgate.errors import MeasurementError, UsageError
from quantgate.machine import describe_machine
from quantgate.plan import Plan, ReleaseRequest, make_plan
from quantgate.preflight import check_variants
from quantgate.progress import Progress
from quantgate.variants.build import Variant

_PLANTED_TOGETHER = 2
"""Calibrating anew is a child process, mostly imports and one busy core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillRequest:
    """What to drill; None for every fault and every layer that is needed."""

    release: ReleaseRequest
    faults: Sequence[str] | None = None
    all_layers: bool = False
    """Judge every fault by every layer, also after one has caught it."""


def run_drill(request: DrillRequest, progress: Progress) -> tuple[DrillResult, Path]:
    """Plants every fault into copies of the policy's variants and judges them.

    Returns:
        The result, and drill.json in a folder of its own under the runs.

    Raises:
        UsageError: the policy cannot be used, or a fault is not known.
        MeasurementError: a sound variant could not be built, or the reference gave no answers.
    """
    started, now = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    faults = _chosen(request.faults)
    plan = make_plan(request.release)
    variants = _build(plan, progress)
    built_s = time.perf_counter() - started
    folder = plan.runs / f"drill-{plan.policy.policy}-{now:%Y%m%d-%H%M%S}"
    judged = {name: variants[name] for name in plan.names}
    gauntlet = Gauntlet(plan=plan, folder=folder, variants=variants, progress=progress)
    try:
        planted = _plant_all(faults, judged, plan, folder / "mutants", progress)
        planted_s = time.perf_counter() - started - built_s
        gauntlet.run(planted.trials, all_layers=request.all_layers)
    finally:
        shutil.rmtree(folder / "mutants", ignore_errors=True)
    rows = (*planted.refused, *(row_of(trial, gauntlet.sound) for trial in planted.trials))
    result = DrillResult(
        policy=plan.policy.policy,
        policy_sha256=plan.policy.sha256,
        source=plan.source.name,
        source_sha256=plan.source.sha256,
        machine=describe_machine(),
        taken_at=now.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 1),
        seconds_by_layer={"build": round(built_s, 1), "plant": round(planted_s, 1)}
        | gauntlet.seconds,
        rows=rows,
        blind_gates=gauntlet.sound.blind_gates(),
        not_applicable=planted.not_applicable,
        advice=_advice(rows, faults),
    )
    write_drill(folder / "drill.json", result)
    return result, folder / "drill.json"


def _chosen(names: Sequence[str] | None) -> list[AnyFault]:
    every = catalogue()
    known = {fault.name for fault in every}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UsageError(
            f"--faults {unknown[0]}: no such fault; expected some of {', '.join(sorted(known))}."
        )
    return [fault for fault in every if names is None or fault.name in names]


def _build(plan: Plan, progress: Progress) -> dict[str, Variant]:
    variants, failures = build_candidates(plan, progress, check_variants(plan))
    if failures:
        raise MeasurementError("\n".join(f"{name}: {why}" for name, why in failures.items()))
    return variants


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlantedAll:
    trials: Sequence[Trial]
    refused: Sequence[DrillRow]
    not_applicable: Mapping[str, str]


def _plant_all(
    faults: Sequence[AnyFault],
    variants: Mapping[str, Variant],
    plan: Plan,
    folder: Path,
    progress: Progress,
) -> _PlantedAll:
    """Plants each fault into each variant that can have it; refusals are rows at once."""
    pairs = [
        (fault, variant)
        for fault in faults
        for variant in variants.values()
        if variant.manifest.scheme in fault.schemes
    ]
    progress.stage("plant", len(pairs))
    folder.mkdir(parents=True)

    def plant_one(pair: tuple[AnyFault, Variant]) -> Trial | DrillRow | NotApplicable:
        fault, variant = pair
        key = f"{fault.name}.{variant.name}"
        started = time.perf_counter()
        try:
            mutant = plant(fault, variant, plan, folder=folder / key)
        except NotApplicable as error:
            return error
        except Refused as refusal:
            seconds = time.perf_counter() - started
            return refused_row(fault, variant.name, refusal, seconds=seconds)
        finally:
            progress.step(note=key)
        seconds = time.perf_counter() - started
        return Trial(key=key, fault=fault, sound=variant, mutant=mutant, seconds=seconds)

    with ThreadPoolExecutor(max_workers=_PLANTED_TOGETHER) as pool:
        planted = list(pool.map(plant_one, pairs))
    not_applicable = {
        f"{fault.name}.{variant.name}": str(found)
        for (fault, variant), found in zip(pairs, planted, strict=True)
        if isinstance(found, NotApplicable)
    }
    for fault in faults:
        if not any(variant.manifest.scheme in fault.schemes for variant in variants.values()):
            schemes = ", ".join(fault.schemes)
            not_applicable.setdefault(fault.name, f"no variant of the policy is {schemes}")
    return _PlantedAll(
        trials=[found for found in planted if isinstance(found, Trial)],
        refused=[found for found in planted if isinstance(found, DrillRow)],
        not_applicable=not_applicable,
    )


def _advice(rows: Sequence[DrillRow], faults: Sequence[AnyFault]) -> dict[str, str]:
    """A gate to add for each fault that was let through."""
    missed = {row.fault for row in rows if row.outcome is Caught.LET_THROUGH}
    return {fault.name: fault.advice for fault in faults if fault.name in missed and fault.advice}
