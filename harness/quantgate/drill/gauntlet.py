"""The way of the trials through the layers, cheap to dear; a caught one stops where it was caught.

Sound variants are measured at the layers that trials come to, out of the store where a release has
measured them. On a CPU two models at a time are scored or served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from quantgate.drill.fault import ServingFault
from quantgate.drill.layers import (
    AUDIT,
    BEHAVIOUR,
    DISTRIBUTION,
    Measured,
    ask,
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
from quantgate.quality.stage import QualityResult, ServedModel
from quantgate.release_folder import store_of
from quantgate.variants.build import Variant


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
        layers: Mapping[str, Callable[[Sequence[Trial]], None]] = {
            AUDIT: self._audit,
            DISTRIBUTION: self._score,
            BEHAVIOUR: self._ask_all,
        }
        planted = {
            trial.mutant.variant.folder: trial.fault.planted
            for trial in trials
            if isinstance(trial.fault, ServingFault) and trial.fault.planted
        }
        with planted_processes(planted):
            for layer, measure in layers.items():
                if not any(layer_of(gate) == layer for gate in self._plan.policy.gates):
                    continue
                left = [
                    trial
                    for trial in trials
                    if layer in trial.layers and (all_layers or not self.sound.has_caught(trial))
                ]
                with self._timed(layer):
                    measure(left)

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
        sound = {t.sound.name: t.sound for t in trials}
        paths = distribution_paths(self._plan, sound, self._variants, store=self._store)
        self._progress.stage("drill: distribution", len(trials) + len(sound))
        folder = self._folder / "distribution"
        folder.mkdir(parents=True, exist_ok=True)
        found = distribution_layer(
            self._plan,
            {f"sound.{name}": variant for name, variant in sound.items()}
            | {t.key: t.mutant.variant for t in trials},
            reference=self._reference().folder,
            out={f"sound.{name}": path for name, path in paths.items()}
            | {t.key: folder / f"{t.key}.parquet" for t in trials},
            log=folder,
            on_done=lambda key: self._progress.step(note=key),
        )
        self._take_sound(DISTRIBUTION, {name: found[f"sound.{name}"] for name in sound})
        self._take(DISTRIBUTION, trials, found)

    # --- behaviour ---

    def _ask_all(self, trials: Sequence[Trial]) -> None:
        if not trials:
            return
        sound = {t.sound.name: t.sound for t in trials}
        num_items = sum(len(golden.items) for golden in self._plan.golden_sets)
        self._progress.stage("drill: behaviour", num_items * (len(trials) + len(sound) + 1))
        with ThreadPoolExecutor(max_workers=self._plan.models_together) as pool:
            models = [self._reference(), *(_served(v, name) for name, v in sound.items())]
            reference, *answers = pool.map(self._ask_sound, models)
            for name, one in zip(sound, answers, strict=True):
                measured = Measured(
                    measurements=reduce_behaviour(self._plan.golden_sets, reference, one),
                    seconds=0.0,
                )
                self._take_sound(BEHAVIOUR, {name: measured})
            judged = pool.map(lambda trial: self._ask_mutant(trial, reference), trials)
            for trial, measured in zip(trials, judged, strict=True):
                self._take(BEHAVIOUR, [trial], {trial.key: measured})

    def _ask_sound(self, model: ServedModel) -> QualityResult:
        return self._ask(model, self._plan.golden_sets, store=self._store, options={})

    def _ask_mutant(self, trial: Trial, reference: QualityResult) -> Measured:
        started = time.perf_counter()
        sets = trial.mutant.golden_sets or self._plan.golden_sets
        answers = self._ask(
            _served(trial.mutant.variant, trial.key),
            sets,
            store=self._folder / "results" / trial.key,
            options=trial.fault.options if isinstance(trial.fault, ServingFault) else {},
        )
        return Measured(
            measurements=reduce_behaviour(sets, reference, answers),
            seconds=time.perf_counter() - started,
        )

    def _ask(
        self,
        model: ServedModel,
        sets: Sequence[GoldenSet],
        *,
        store: Path,
        options: Mapping[str, int],
    ) -> QualityResult:
        store.mkdir(parents=True, exist_ok=True)
        return ask(
            self._plan,
            model,
            sets,
            store=store,
            log=self._folder / "servers" / f"{model.name}.log",
            options=options,
            on_answers=lambda count: self._progress.step(count, model.name),
        )

    # --- what was found ---

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
