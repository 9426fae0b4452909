"""The way of the trials through the layers, cheap to dear; a caught one stops where it was caught.

Sound variants are measured at the layers that trials come to, out of the store where a release has
measured them. On a CPU two models at a time are scored or served.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from quantgate.drill.asked_model import AskedModel, ReferenceDocuments, asking
from quantgate.drill.fault import ServingFault
from quantgate.drill.layers import (
    AUDIT,
    BEHAVIOUR,
    DISTRIBUTION,
    SERVED,
    Measured,
    audit_layer,
    distribution_layer,
    judge_layer,
    layer_of,
    reduce_behaviour,
)
from quantgate.drill.planted_processes import planted_processes
from quantgate.drill.trials import Sound, Trial
from quantgate.plan import Plan
from quantgate.policy import SOURCE
from quantgate.progress import Progress
from quantgate.quality.distribution_store import distribution_paths
from quantgate.quality.golden import GoldenSet
from quantgate.quality.served import is_asked_twice
from quantgate.quality.stage import QualityResult, ServedModel
from quantgate.release_folder import store_of
from quantgate.variants.build import Variant

_SERVER = "server"
"""What the layers served and behaviour took: one server a model answers for both."""
_SOUND = "sound."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """What the reference's server said; None of a layer that the policy has no gate for."""

    documents: ReferenceDocuments | None
    answers: QualityResult | None


class Gauntlet:
    """One drill's layers, in order."""

    def __init__(
        self, *, plan: Plan, folder: Path, variants: Mapping[str, Variant], progress: Progress
    ) -> None:
        self.sound = Sound()
        self.seconds: dict[str, float] = {}
        """What each layer took."""
        self._plan = plan
        self._folder = folder
        self._variants = variants
        self._progress = progress
        self._store = store_of(plan.runs) / "results"
        self._store.mkdir(parents=True, exist_ok=True)

    def run(self, trials: Sequence[Trial], *, all_layers: bool) -> None:
        """Takes trials through the layers.

        Args:
            all_layers: go on after a catch, for what dearer layers say of it.

        Raises:
            MeasurementError: the reference gave no answers.
        """
        steps: Mapping[str, tuple[Sequence[str], Callable[[Sequence[Trial]], None]]] = {
            AUDIT: ((AUDIT,), self._audit),
            DISTRIBUTION: ((DISTRIBUTION,), self._score),
            _SERVER: ((SERVED, BEHAVIOUR), partial(self._ask_all, all_layers=all_layers)),
        }
        with planted_processes(self._planted(trials)):
            for name, (layers, measure) in steps.items():
                gated = {layer for layer in layers if self._is_gated(layer)}
                if not gated:
                    continue
                left = [
                    trial
                    for trial in trials
                    if gated.intersection(trial.layers)
                    and (all_layers or not self.sound.has_caught(trial))
                ]
                with self._timed(name):
                    measure(left)

    def _planted(self, trials: Sequence[Trial]) -> dict[Path, str]:
        """The fault of each folder: mutants, and copies of the reference for faults of engines."""
        planted = {}
        for trial in trials:
            fault = trial.fault
            if not isinstance(fault, ServingFault) or fault.planted is None:
                continue
            planted[trial.mutant.variant.folder] = fault.planted
            copy = self._faulty_reference(fault)
            if fault.is_in_reference and copy not in planted:
                shutil.copytree(self._reference().folder, copy)
                planted[copy] = fault.planted
        return planted

    def _faulty_reference(self, fault: ServingFault) -> Path:
        return self._folder / "mutants" / f"reference.{fault.name}"

    # --- audit ---

    def _audit(self, trials: Sequence[Trial]) -> None:
        self._progress.stage("drill: audit", len(trials))
        log = self._folder / "audit-sound.log"
        sound = audit_layer(self._plan, self._variants, store=self._store, log=log)
        self._take_sound(AUDIT, sound)
        found = audit_layer(
            self._plan,
            {trial.key: trial.mutant.variant for trial in trials},
            store=self._folder / "results",
            log=self._folder / "audit.log",
        )
        self._take(AUDIT, trials, found)
        self._progress.step(len(trials))

    # --- distribution ---

    def _score(self, trials: Sequence[Trial]) -> None:
        self._progress.stage("drill: distribution", len(trials) + len(_sound_of(trials)))
        found = self._scored(trials, on_done=lambda key: self._progress.step(note=key))
        self._take(DISTRIBUTION, trials, found)

    def _scored(
        self, trials: Sequence[Trial], *, on_done: Callable[[str], None]
    ) -> dict[str, Measured]:
        """Trials and their sound variants scored offline, unless they were before."""
        sound = _sound_of(trials)
        out = self._offline(trials)
        found = distribution_layer(
            self._plan,
            {_SOUND + name: variant for name, variant in sound.items()}
            | {t.key: t.mutant.variant for t in trials if t.key in out},
            reference=self._reference().folder,
            out=out,
            log=self._folder / "distribution",
            on_done=on_done,
        )
        self._take_sound(DISTRIBUTION, {name: found[_SOUND + name] for name in sound})
        return found

    def _offline(self, trials: Sequence[Trial]) -> dict[str, Path]:
        """Where offline scoring goes; a mutant of its server alone has none of its own."""
        folder = self._folder / "distribution"
        folder.mkdir(parents=True, exist_ok=True)
        sound = _sound_of(trials)
        paths = distribution_paths(self._plan, sound, self._variants, store=self._store)
        return {_SOUND + name: path for name, path in paths.items()} | {
            t.key: folder / f"{t.key}.parquet" for t in trials if DISTRIBUTION in t.layers
        }

    # --- through the server: served = offline, then behaviour, of one server a model ---

    def _ask_all(self, trials: Sequence[Trial], *, all_layers: bool) -> None:
        if not trials:
            return
        sound = _sound_of(trials)
        self._progress.stage("drill: server", len(trials) + len(sound) + 1)
        offline = {}
        if self._is_gated(SERVED):
            offline = self._offline(trials)
            self._scored(trials, on_done=lambda _: None)
        with ThreadPoolExecutor(max_workers=self._plan.models_together) as pool:
            beside = pool.submit(self._ask_reference)
            again = {
                fault.name: pool.submit(self._ask_faulty_reference, fault)
                for fault in {t.fault.name: t.fault for t in trials}.values()
                if isinstance(fault, ServingFault) and fault.is_in_reference
            }
            reference = beside.result()
            faulty = {name: replace(reference, documents=f.result()) for name, f in again.items()}
            said = {
                name: pool.submit(self._ask_sound, name, variant, reference, offline)
                for name, variant in sound.items()
            }
            for name, future in said.items():
                for layer, measured in future.result().items():
                    self._take_sound(layer, {name: measured})

            def ask(trial: Trial) -> None:
                self._ask_mutant(
                    trial, faulty.get(trial.fault.name, reference), offline, all_layers=all_layers
                )
                self._progress.step(note=trial.key)

            list(pool.map(ask, trials))

    def _ask_reference(self) -> _Reference:
        with self._asking(self._reference(), store=self._store) as model:
            documents = model.documents_twice() if self._is_gated(SERVED) else None
            answers = model.answers(self._plan.golden_sets) if self._is_gated(BEHAVIOUR) else None
        self._progress.step(note="reference")
        return _Reference(documents=documents, answers=answers)

    def _ask_faulty_reference(self, fault: ServingFault) -> ReferenceDocuments | None:
        if not self._is_gated(SERVED):
            return None
        model = replace(self._reference(), folder=self._faulty_reference(fault), name=fault.name)
        with self._asking(model, store=self._folder / "results" / fault.name) as asked:
            return asked.documents_twice()

    def _ask_sound(
        self, name: str, variant: Variant, reference: _Reference, offline: Mapping[str, Path]
    ) -> dict[str, Measured]:
        found = {}
        with self._asking(_served(variant, name), store=self._store) as model:
            if reference.documents is not None:
                path = offline[_SOUND + name]
                found[SERVED] = self._documents(model, name, path, reference.documents)
            if reference.answers is not None:
                sets = self._plan.golden_sets
                found[BEHAVIOUR] = self._behaviour(model, sets, reference.answers)
        self._progress.step(note=name)
        return found

    def _ask_mutant(
        self,
        trial: Trial,
        reference: _Reference,
        offline: Mapping[str, Path],
        *,
        all_layers: bool,
    ) -> None:
        options = trial.fault.options if isinstance(trial.fault, ServingFault) else {}
        store = self._folder / "results" / trial.key
        mutant = _served(trial.mutant.variant, trial.key)
        with self._asking(mutant, store=store, options=options) as model:
            if reference.documents is not None and SERVED in trial.layers:
                path = offline.get(trial.key, offline[_SOUND + trial.sound.name])
                measured = self._documents(model, trial.sound.name, path, reference.documents)
                self._take(SERVED, [trial], {trial.key: measured})
            is_done = self.sound.has_caught(trial) and not all_layers
            if reference.answers is not None and not is_done:
                sets = trial.mutant.golden_sets or self._plan.golden_sets
                measured = self._behaviour(model, sets, reference.answers)
                self._take(BEHAVIOUR, [trial], {trial.key: measured})

    def _documents(
        self, model: AskedModel, name: str, offline: Path, beside: ReferenceDocuments
    ) -> Measured:
        started = time.perf_counter()
        found = model.documents(
            self._reference().folder,
            offline=offline,
            beside=beside,
            is_twice=is_asked_twice(self._plan.policy, name),
        )
        return Measured(measurements=found, seconds=time.perf_counter() - started)

    def _behaviour(
        self, model: AskedModel, sets: Sequence[GoldenSet], reference: QualityResult
    ) -> Measured:
        started = time.perf_counter()
        found = reduce_behaviour(sets, reference, model.answers(sets))
        return Measured(measurements=found, seconds=time.perf_counter() - started)

    def _asking(
        self, model: ServedModel, *, store: Path, options: Mapping[str, int] | None = None
    ) -> AbstractContextManager[AskedModel]:
        log = self._folder / "servers" / f"{model.name}.log"
        return asking(self._plan, model, store=store, log=log, options=options)

    # --- what was found ---

    def _is_gated(self, layer: str) -> bool:
        return any(layer_of(gate) == layer for gate in self._plan.policy.gates)

    def _take(self, layer: str, trials: Sequence[Trial], found: Mapping[str, Measured]) -> None:
        for trial in trials:
            measured = found[trial.key]
            verdicts = judge_layer(self._plan, layer, trial.sound.name, measured)
            trial.take(layer, measured, verdicts)

    def _take_sound(self, layer: str, found: Mapping[str, Measured]) -> None:
        for name, measured in found.items():
            verdicts = judge_layer(self._plan, layer, name, measured)
            self.sound.take(layer, name, measured, verdicts)

    def _reference(self) -> ServedModel:
        name, source = self._plan.policy.reference, self._plan.source
        if name != SOURCE:
            return _served(self._variants[name], name)
        return ServedModel(name=SOURCE, folder=source.folder, artifact_sha256=source.sha256)

    @contextmanager
    def _timed(self, layer: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[layer] = round(time.perf_counter() - started, 1)


def _served(variant: Variant, name: str) -> ServedModel:
    return ServedModel(
        name=name, folder=variant.folder, artifact_sha256=variant.manifest.artifact_sha256
    )


def _sound_of(trials: Sequence[Trial]) -> dict[str, Variant]:
    return {trial.sound.name: trial.sound for trial in trials}
