"""Runs a policy against every fault: what is refused, then layer by layer what the gates catch.

A gate catches a fault if it passes on the sound variant and fails, or is INVALID, on the damaged
one. A gate that does not pass on the sound variant can tell nothing, and is named.
"""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantgate.candidates import build_candidates
from quantgate.drill.artifact import NotApplicable
from quantgate.drill.catalogue import catalogue
from quantgate.drill.fault import AnyFault, ServingFault
from quantgate.drill.layers import (
    AUDIT,
    BEHAVIOUR,
    DISTRIBUTION,
    LAYERS,
    Measured,
    ask,
    audit_layer,
    distribution_layer,
    layer_of,
    planted,
    reduce_behaviour,
)
from quantgate.drill.planting import Planted, Refused, plant
from quantgate.drill.results import Caught, DrillResult, DrillRow, write_drill
from quantgate.errors import MeasurementError, UsageError
from quantgate.machine import describe_machine
from quantgate.measure import Clustered, Scalar
from quantgate.plan import Plan, ReleaseRequest, make_plan
from quantgate.policy import SOURCE, required_gates
from quantgate.preflight import check_variants
from quantgate.progress import Progress
from quantgate.quality.stage import QualityResult, ServedModel
from quantgate.release_folder import store_of
from quantgate.variants.build import Variant
from quantgate.verdict import Outcome, Verdict, judge

_NO_EFFECT = 1.05
"""A mean KL within this factor of the sound variant's is no effect to be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillRequest:
    """What to drill; None for every fault and every layer that is needed."""

    release: ReleaseRequest
    faults: Sequence[str] | None = None
    all_layers: bool = False
    """Judge every fault by every layer, also after one has caught it."""


@dataclass(slots=True, kw_only=True)
class _Trial:
    """One fault in one variant, on its way through the layers."""

    key: str
    fault: AnyFault
    sound: Variant
    mutant: Planted
    measured: dict[str, Measured] = field(default_factory=dict)
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    seconds: float = 0.0


def run_drill(request: DrillRequest, progress: Progress) -> tuple[DrillResult, Path]:
    """Plants every fault into copies of the policy's variants and judges them.

    Returns:
        The result, and drill.json in a folder of its own under the runs.

    Raises:
        UsageError: the policy cannot be used, or a fault is not known.
        MeasurementError: a sound variant could not be built, or the reference gave no answers.
    """
    started = time.perf_counter()
    faults = _chosen(request.faults)
    plan = make_plan(request.release)
    preflight = check_variants(plan)
    variants, failures = build_candidates(plan, progress, preflight)
    variants = {name: variants[name] for name in plan.names if name in variants}
    if failures:
        raise MeasurementError("\n".join(f"{name}: {why}" for name, why in failures.items()))
    now = datetime.datetime.now(datetime.UTC)
    folder = plan.runs / f"drill-{plan.policy.policy}-{now:%Y%m%d-%H%M%S}"
    drill = _Drill(plan=plan, folder=folder, variants=variants, progress=progress)
    try:
        drill.plant_all(faults)
        drill.measure_sound()
        drill.judge_all(all_layers=request.all_layers)
    finally:
        shutil.rmtree(folder / "mutants", ignore_errors=True)
    rows = tuple(drill.rows())
    result = DrillResult(
        policy=plan.policy.policy,
        policy_sha256=plan.policy.sha256,
        source_sha256=plan.source.sha256,
        machine=describe_machine(),
        taken_at=now.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        rows=rows,
        blind_gates=drill.blind_gates(),
        not_applicable=drill.not_applicable,
        advice={
            row.fault: fault.advice
            for row in rows
            for fault in faults
            if row.outcome is Caught.LET_THROUGH and fault.name == row.fault and fault.advice
        },
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


class _Drill:
    """One drill under way."""

    def __init__(
        self, *, plan: Plan, folder: Path, variants: Mapping[str, Variant], progress: Progress
    ) -> None:
        self.not_applicable: dict[str, str] = {}
        self._plan = plan
        self._folder = folder
        self._variants = variants
        self._progress = progress
        self._trials: list[_Trial] = []
        self._rows: list[DrillRow] = []
        self._sound: dict[str, dict[str, Measured]] = {layer: {} for layer in LAYERS}
        self._sound_verdicts: dict[str, dict[str, Verdict]] = {name: {} for name in variants}
        self._reference_answers: QualityResult | None = None

    # --- planting ---

    def plant_all(self, faults: Sequence[AnyFault]) -> None:
        """Plants each fault into each variant that can have it; refusals are rows at once."""
        pairs = [
            (fault, variant)
            for fault in faults
            for variant in self._variants.values()
            if variant.manifest.scheme in fault.schemes
        ]
        self._progress.stage("plant", len(pairs))
        (self._folder / "mutants").mkdir(parents=True)
        for fault, variant in pairs:
            key = f"{fault.name}.{variant.name}"
            started = time.perf_counter()
            try:
                mutant = plant(fault, variant, self._plan, folder=self._folder / "mutants" / key)
            except NotApplicable as error:
                self.not_applicable[key] = str(error)
            except Refused as refusal:
                seconds = time.perf_counter() - started
                self._rows.append(_refused_row(fault, variant, refusal, seconds=seconds))
            else:
                trial = _Trial(key=key, fault=fault, sound=variant, mutant=mutant)
                trial.seconds = time.perf_counter() - started
                self._trials.append(trial)
            self._progress.step(note=key)
        for fault in faults:
            if not any(v.manifest.scheme in fault.schemes for v in self._variants.values()):
                schemes = ", ".join(fault.schemes)
                self.not_applicable[fault.name] = f"no variant of the policy is {schemes}"

    # --- judging ---

    def measure_sound(self) -> None:
        """What the gates say of the sound variants, at the layers that trials will need."""
        store = store_of(self._plan.runs) / "results"
        log = self._folder / "audit-sound.log"
        self._judge_sound(AUDIT, audit_layer(self._plan, self._variants, store=store, log=log))

    def judge_all(self, *, all_layers: bool) -> None:
        """Takes the trials through the layers; the caught ones stop at the first that caught."""
        artifacts = [t for t in self._trials if not isinstance(t.fault, ServingFault)]
        self._progress.stage("drill: audit", len(artifacts))
        found = audit_layer(
            self._plan,
            {t.key: t.mutant.variant for t in artifacts},
            store=self._folder / "results",
            log=self._folder / "audit.log",
        )
        self._take(AUDIT, artifacts, found)
        self._progress.step(len(artifacts))
        open_ones = [t for t in self._trials if all_layers or not self._stopped(t)]
        if self._has_layer(DISTRIBUTION):
            self._judge_distribution(open_ones)
        open_ones = [t for t in open_ones if all_layers or not self._stopped(t)]
        if self._has_layer(BEHAVIOUR):
            self._judge_behaviour(open_ones)

    def _judge_distribution(self, trials: Sequence[_Trial]) -> None:
        # Server options change nothing where there is no server.
        wanted = [t for t in trials if not _is_only_options(t.fault)]
        if not wanted:
            return
        needed = {t.sound.name: t.sound for t in wanted}
        self._progress.stage("drill: distribution", len(wanted) + len(needed))
        sound = {f"sound.{name}": variant for name, variant in needed.items()}
        together = [t for t in wanted if not isinstance(t.fault, ServingFault)]
        models = sound | {t.key: t.mutant.variant for t in together}
        found = self._distribution(models, "artifacts")
        self._judge_sound(DISTRIBUTION, {n: found[f"sound.{n}"] for n in needed})
        self._take(DISTRIBUTION, together, found)
        for trial in wanted:
            if isinstance(trial.fault, ServingFault):
                with planted(trial.fault.planted, trial.mutant.variant.folder):
                    one = self._distribution({trial.key: trial.mutant.variant}, trial.key)
                self._take(DISTRIBUTION, [trial], one)

    def _distribution(self, models: Mapping[str, Variant], name: str) -> dict[str, Measured]:
        return distribution_layer(
            self._plan,
            models,
            reference=self._reference_folder(),
            folder=self._folder / "distribution" / name,
            on_done=lambda key: self._progress.step(note=key),
        )

    def _judge_behaviour(self, trials: Sequence[_Trial]) -> None:
        if not trials:
            return
        num_items = sum(len(golden.items) for golden in self._plan.golden_sets)
        needed = {t.sound.name: t.sound for t in trials}
        self._progress.stage("drill: behaviour", num_items * (len(trials) + len(needed) + 1))
        store = store_of(self._plan.runs) / "results"
        reference = self._ask(self._reference_model(), store=store, name="reference")
        self._reference_answers = reference
        for name, variant in needed.items():
            answers = self._ask(_served(variant, name), store=store, name=f"sound-{name}")
            measured = Measured(
                measurements=reduce_behaviour(self._plan, reference, answers), seconds=0.0
            )
            self._judge_sound(BEHAVIOUR, {name: measured})
        for trial in trials:
            started = time.perf_counter()
            fault = trial.fault
            variant = trial.mutant.variant
            serving = fault if isinstance(fault, ServingFault) else None
            with planted(serving.planted if serving else None, variant.folder):
                answers = self._ask(
                    _served(variant, trial.key),
                    store=self._folder / "results" / trial.key,
                    name=trial.key,
                    options=serving.options if serving else None,
                )
            measured = Measured(
                measurements=reduce_behaviour(self._plan, reference, answers),
                seconds=time.perf_counter() - started,
            )
            self._take(BEHAVIOUR, [trial], {trial.key: measured})

    def _ask(
        self,
        model: ServedModel,
        *,
        store: Path,
        name: str,
        options: Mapping[str, int] | None = None,
    ) -> QualityResult:
        store.mkdir(parents=True, exist_ok=True)
        return ask(
            self._plan,
            model,
            store=store,
            log=self._folder / "servers" / f"{name}.log",
            options=options or {},
            on_answers=lambda count: self._progress.step(count, name),
        )

    def _take(self, layer: str, trials: Sequence[_Trial], found: Mapping[str, Measured]) -> None:
        for trial in trials:
            if trial.key not in found:
                continue
            trial.measured[layer] = found[trial.key]
            trial.seconds += found[trial.key].seconds
            trial.verdicts[layer] = self._judge(layer, trial.sound.name, found[trial.key])

    def _judge_sound(self, layer: str, found: Mapping[str, Measured]) -> None:
        self._sound[layer] |= found
        for name, measured in found.items():
            for verdict in self._judge(layer, name, measured):
                self._sound_verdicts[name][verdict.gate_id] = verdict

    def _judge(self, layer: str, variant: str, measured: Measured) -> list[Verdict]:
        by_metric = {m.metric: m for m in measured.measurements}
        baseline = SOURCE if layer == AUDIT else self._plan.policy.reference
        return [
            judge(gate, by_metric.get(gate.metric), variant=variant, baseline=baseline)
            for gate in required_gates(self._plan.policy, variant)
            if layer_of(gate) == layer
        ]

    def _turned(self, trial: _Trial, layer: str, *outcomes: Outcome) -> list[Verdict]:
        """Verdicts of gates that pass on the sound variant and have one of these outcomes now."""
        sound = self._sound_verdicts[trial.sound.name]
        return [
            verdict
            for verdict in trial.verdicts.get(layer, ())
            if verdict.outcome in outcomes
            and verdict.gate_id in sound
            and sound[verdict.gate_id].outcome is Outcome.PASS
        ]

    def _stopped(self, trial: _Trial) -> bool:
        return any(self._turned(trial, layer, Outcome.FAIL, Outcome.INVALID) for layer in LAYERS)

    def _has_layer(self, layer: str) -> bool:
        return any(layer_of(gate) == layer for gate in self._plan.policy.gates)

    def _reference_folder(self) -> Path:
        if self._plan.policy.reference == SOURCE:
            return self._plan.source.folder
        return self._variants[self._plan.policy.reference].folder

    def _reference_model(self) -> ServedModel:
        reference = self._plan.policy.reference
        if reference != SOURCE:
            return _served(self._variants[reference], reference)
        source = self._plan.source
        return ServedModel(name=SOURCE, folder=source.folder, artifact_sha256=source.sha256)

    # --- reporting ---

    def blind_gates(self) -> dict[str, tuple[str, ...]]:
        return {
            name: tuple(v.gate_id for v in verdicts.values() if v.outcome is not Outcome.PASS)
            for name, verdicts in self._sound_verdicts.items()
            if any(v.outcome is not Outcome.PASS for v in verdicts.values())
        }

    def rows(self) -> list[DrillRow]:
        return [*self._rows, *(self._row(trial) for trial in self._trials)]

    def _row(self, trial: _Trial) -> DrillRow:
        blocking: tuple[Outcome, ...] = (Outcome.FAIL, Outcome.INVALID)
        if not trial.fault.is_harmful:
            # Undecided blocks a promotion as well.
            blocking = (*blocking, Outcome.INCONCLUSIVE)
        layer, turned = "", list[Verdict]()
        for layer in trial.verdicts:
            turned = self._turned(trial, layer, *blocking)
            if turned:
                break
        outcome = self._outcome(trial, is_caught=bool(turned))
        return DrillRow(
            fault=trial.fault.name,
            what=trial.fault.what,
            variant=trial.sound.name,
            is_harmful=trial.fault.is_harmful,
            outcome=outcome,
            layer=layer if turned else "",
            gates=tuple(verdict.gate_id for verdict in turned),
            verdict=turned[0].outcome.value if turned else "",
            effect=self._effect(trial),
            seconds=round(trial.seconds, 2),
            note=self._note(trial, outcome, turned),
        )

    def _outcome(self, trial: _Trial, *, is_caught: bool) -> Caught:
        if not trial.fault.is_harmful:
            return Caught.BLOCKED if is_caught else Caught.PASSED
        if is_caught:
            return Caught.CAUGHT
        factor = self._kl_factor(trial)
        if trial.fault.why_invisible and factor is not None and factor <= _NO_EFFECT:
            return Caught.NO_EFFECT
        return Caught.LET_THROUGH

    def _note(self, trial: _Trial, outcome: Caught, turned: Sequence[Verdict]) -> str:
        if outcome in (Caught.CAUGHT, Caught.BLOCKED):
            return turned[0].reason
        held = [
            verdict.gate_id
            for layer in trial.verdicts
            for verdict in self._turned(trial, layer, Outcome.INCONCLUSIVE)
        ]
        undecided = f"undecided: {', '.join(held)}" if held else ""
        why = trial.fault.why_invisible if outcome is not Caught.PASSED else ""
        return "; ".join(filter(None, (undecided, why)))

    def _kl_factor(self, trial: _Trial) -> float | None:
        """Mean KL over the sound variant's; None where either was not measured."""
        mine = _kl(trial.measured.get(DISTRIBUTION))
        sound = _kl(self._sound[DISTRIBUTION].get(trial.sound.name))
        return None if mine is None or not sound else mine / sound

    def _effect(self, trial: _Trial) -> str:
        """How large the fault is, by the deepest layer that has a number for it."""
        factor, kl = self._kl_factor(trial), _kl(trial.measured.get(DISTRIBUTION))
        if factor is not None and kl is not None:
            return f"KL {kl:.3g} nats, {factor:.3g} x sound"
        audited = trial.measured.get(AUDIT)
        if audited is None:
            return ""
        values = _scalars(audited)
        sound = _scalars(self._sound[AUDIT][trial.sound.name])
        parts = []
        error, gain = values.get("audit/weight_error.ratio"), values.get("audit/group_gain.ratio")
        if error is not None and error > 1.05 * sound.get("audit/weight_error.ratio", 0.0):
            parts.append(f"weights {error:.3g} x rounding")
        if gain is not None and gain > 1.25 and (error or 0) < 3:
            parts.append(f"a scale off by {gain:.3g} x")
        changed = [
            f"{value:g} {metric.removeprefix('audit/').removesuffix('.count').replace('_', ' ')}"
            for metric, value in values.items()
            if metric.endswith("_difference.count") and value
        ]
        return ", ".join(parts + changed)


def _served(variant: Variant, name: str) -> ServedModel:
    return ServedModel(
        name=name, folder=variant.folder, artifact_sha256=variant.manifest.artifact_sha256
    )


def _is_only_options(fault: AnyFault) -> bool:
    return isinstance(fault, ServingFault) and fault.planted is None


def _scalars(measured: Measured) -> dict[str, float]:
    return {m.metric: m.value for m in measured.measurements if isinstance(m, Scalar)}


def _kl(measured: Measured | None) -> float | None:
    for measurement in measured.measurements if measured else ():
        if measurement.metric == "quality/kl_nats.mean" and isinstance(measurement, Clustered):
            return sum(measurement.totals) / sum(measurement.counts)
    return None


def _refused_row(
    fault: AnyFault, variant: Variant, refusal: Refused, *, seconds: float
) -> DrillRow:
    return DrillRow(
        fault=fault.name,
        what=fault.what,
        variant=variant.name,
        is_harmful=fault.is_harmful,
        outcome=Caught.CAUGHT if fault.is_harmful else Caught.BLOCKED,
        layer=refusal.layer,
        gates=(),
        verdict="refused",
        effect="",
        seconds=round(seconds, 2),
        note=str(refusal).splitlines()[0],
    )
