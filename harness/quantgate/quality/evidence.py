"""All quality layers of a release, side by side: answers, distribution, served = offline, noise.

On a CPU two things happen at a time, each on a core of its own; a GPU is not shared. What each
server is asked is a queue of pieces, a golden set or the documents each (`turns.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from quantgate.errors import MeasurementError
from quantgate.files import write_bytes
from quantgate.measure import Measurement, Missing
from quantgate.plan import Plan
from quantgate.policy import SOURCE, required_gates
from quantgate.progress import Progress
from quantgate.quality import distribution_results, noise_floor, served
from quantgate.quality.completions import FULL_BATCHES
from quantgate.quality.distribution import Candidate, Comparison, compare_with_reference
from quantgate.quality.distribution_store import distribution_paths, group_size_of
from quantgate.quality.early_stop import stop_rules
from quantgate.quality.golden import GoldenSet
from quantgate.quality.noise_floor import OTHER_BATCHES, Rerun
from quantgate.quality.questions import Questions, size_of
from quantgate.quality.results import metrics_of
from quantgate.quality.stage import QualityResult, ServedModel, join_results
from quantgate.quality.turns import Piece, take_turns
from quantgate.release_folder import ReleaseFolder
from quantgate.resolution import NoiseFloor
from quantgate.server_pool import ServerPool
from quantgate.variants.build import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityEvidence:
    """What the layers found, by variant; files lie in the release folder."""

    answers: Mapping[str, QualityResult]
    """Of the reference too."""
    distribution_failures: Mapping[str, str]
    served_failures: Mapping[str, str]
    noise: tuple[Measurement, ...]
    """The noise floor of the reference's log-probabilities; none without a distribution."""
    noise_floors: Mapping[str, NoiseFloor]
    seconds: Mapping[str, Mapping[str, float]]
    """By model, and by what it was asked; the first has the start of its server in it."""


def measure_evidence(
    plan: Plan,
    release: ReleaseFolder,
    variants: Mapping[str, Variant],
    servers: ServerPool,
    progress: Progress,
) -> QualityEvidence:
    """Measures every layer of every variant; what cannot be measured has its reason.

    Raises:
        UsageError: there is no document with two tokens.
    """
    work = _Work(plan, release, variants, servers, progress)
    progress.stage("quality", work.num_steps)
    seconds = take_turns(work.queues(), workers=plan.models_together)
    answers = {name: asked.answers for name, asked in work.asked.items()}
    for name, found in answers.items():
        for golden, reason in found.missing.items():
            progress.note(f"{name}: {golden}: {reason.splitlines()[0]}")
        for golden, stop in found.stopped.items():
            progress.note(f"{name}: {golden}: {stop}")
    return QualityEvidence(
        answers=answers,
        distribution_failures=work.distribution_failures,
        served_failures={n: a.served_failure for n, a in work.asked.items() if a.served_failure},
        noise=work.noise,
        noise_floors={floor.metric: floor for floor in work.floors},
        seconds=seconds,
    )


class _Asked:
    """What one model's server has said so far; `num_left` sets are still to be asked."""

    def __init__(self, num_left: int) -> None:
        self.num_left = num_left
        self.served_failure: str | None = None
        self._results: list[QualityResult] = []

    def take(self, result: QualityResult, num_sets: int) -> None:
        self._results.append(result)
        self.num_left -= num_sets

    @property
    def answers(self) -> QualityResult:
        return join_results(self._results)


class _Work:
    """The pieces of work, each to be done by one thread, and what they found."""

    def __init__(
        self,
        plan: Plan,
        release: ReleaseFolder,
        variants: Mapping[str, Variant],
        servers: ServerPool,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._release = release
        self._variants = variants
        self._progress = progress
        self.models = [
            ServedModel(name=v.name, folder=v.folder, artifact_sha256=v.manifest.artifact_sha256)
            for v in variants.values()
        ]
        if plan.policy.reference == SOURCE:
            folder, digest = plan.source.folder, plan.source.sha256
            self.models.insert(0, ServedModel(name=SOURCE, folder=folder, artifact_sha256=digest))
        self.reference = next(m for m in self.models if m.name == plan.policy.reference)
        self._questions = Questions(
            plan, release, servers, progress, tokenizer=self.reference.folder
        )
        num_sets = len(plan.golden_sets)
        self.asked = {model.name: _Asked(num_sets) for model in self.models}
        self._again = _Asked(num_sets)
        self.distribution_failures: dict[str, str] = {}
        self.noise: tuple[Measurement, ...] = ()
        self.floors: list[NoiseFloor] = []

    @property
    def num_steps(self) -> int:
        """Items and documents asked, the reference's twice, and comparisons of distributions."""
        num_documents = len(self._questions.documents)
        num_compared = len(self._variants) if num_documents else 0
        twice = [m for m in self.models if served.is_asked_twice(self._plan.policy, m.name)]
        num_again = len(twice) * num_documents
        return self._questions.num_asked * (len(self.models) + 1) + num_again + num_compared

    def queues(self) -> dict[str, list[Piece]]:
        """By model; the reference first, since others may wait for its answers."""
        reference = self.reference.name
        others = [model for model in self.models if model.name != reference]
        queues = {reference: [*self._ask(self.reference), *self._ask_again()]}
        if self._questions.documents:
            # Three passes over the documents: the reference, and each variant and its twin.
            size = self._questions.size_of_documents * (1 + 2 * len(self._variants))
            queues["all variants"] = [
                Piece(name="distribution", size=size, work=self._compare_distributions)
            ]
        return queues | {model.name: self._ask(model) for model in others}

    def _ask(self, model: ServedModel) -> list[Piece]:
        """Golden sets and documents through the server."""
        gates = []
        if model.name != self.reference.name:
            gates = [g for g in required_gates(self._plan.policy, model.name) if g.sequential]
        asked, reference = self.asked[model.name], self.asked[self.reference.name]

        def ask(sets: tuple[GoldenSet, ...]) -> None:
            rules = stop_rules(gates, reference.answers.items) if gates else None
            found = self._questions.ask_golden(model, FULL_BATCHES, sets, rules)
            for golden, path in found.items.items():
                write_bytes(self._release.items(model.name, golden), path.read_bytes())
            asked.take(found, len(sets))

        def ask_documents() -> None:
            try:
                self._questions.ask_documents(model, FULL_BATCHES, self._release.served(model.name))
                if served.is_asked_twice(self._plan.policy, model.name):
                    again = self._release.rerun(model.name, "served")
                    self._questions.ask_documents(model, OTHER_BATCHES, again)
            except MeasurementError as error:
                asked.served_failure = str(error)
                self._progress.note(f"{model.name}: served: {str(error).splitlines()[0]}")

        # Where a gate is looked at early, once the reference's answers are there.
        is_ready = (lambda: reference.num_left == 0) if gates else (lambda: True)
        return [
            *(
                Piece(
                    name=_name_of(sets),
                    size=size_of(sets),
                    work=partial(ask, sets),
                    is_ready=is_ready,
                )
                for sets in self._questions.sets_together
            ),
            *self._documents_piece("served", ask_documents),
        ]

    def _ask_again(self) -> list[Piece]:
        """The reference, all of it once more at another batch size and order."""

        def ask(sets: tuple[GoldenSet, ...]) -> None:
            self._again.take(
                self._questions.ask_golden(self.reference, OTHER_BATCHES, sets), len(sets)
            )

        return [
            *(
                Piece(name=f"{_name_of(sets)} again", size=size_of(sets), work=partial(ask, sets))
                for sets in self._questions.sets_together
            ),
            *self._documents_piece("served again", self._ask_documents_again),
            Piece(name="noise floors", size=0, work=self._find_floors_of_sets),
        ]

    def _documents_piece(self, name: str, work: Callable[[], None]) -> list[Piece]:
        if not self._questions.documents:
            return []
        return [Piece(name=name, size=self._questions.size_of_documents, work=work)]

    def _find_floors_of_sets(self) -> None:
        """What of the reference's answers came out differently."""
        model, release = self.reference, self._release
        first, again = self.asked[model.name].answers, self._again.answers
        for golden in self._plan.golden_sets:
            name = golden.name
            reason = first.missing.get(name) or again.missing.get(name)
            if reason:
                self.floors += noise_floor.missing_floors(metrics_of(golden), reason)
                continue
            path = release.rerun(model.name, name)
            write_bytes(path, again.items[name].read_bytes())
            self.floors += noise_floor.floors_of_golden_set(
                golden,
                Rerun(first=release.items(model.name, name), second=path),
                source=release.relative(path),
            )

    def _compare_distributions(self) -> None:
        """Teacher-forced KL against the reference."""
        plan, progress = self._plan, self._progress
        paths = distribution_paths(
            plan, self._variants, self._variants, store=self._questions.store
        )
        wanted = {
            name: Candidate(
                folder=variant.folder,
                scheme=plan.policy.variants[name].scheme,
                group_size=group_size_of(plan, name, variant.folder),
            )
            for name, variant in self._variants.items()
            if not paths[name].is_file()
        }
        if found := len(self._variants) - len(wanted):
            progress.step(found, note="distribution reused")
        self.distribution_failures = compare_with_reference(
            Comparison(
                reference=self.reference.folder,
                documents=self._questions.documents,
                device=plan.device,
                dtype=plan.dtype,
                threads=plan.server.threads,
                max_tokens=self._questions.max_tokens,
                max_context=plan.server.max_context,
            ),
            wanted,
            out=paths,
            log=self._release.path / "distribution.log",
            on_done=lambda name: progress.step(note=f"{name} distribution"),
        )
        for name, path in paths.items():
            if path.is_file():
                write_bytes(self._release.distribution(name), path.read_bytes())
        for name, reason in self.distribution_failures.items():
            progress.note(f"{name}: {reason}")

    def _ask_documents_again(self) -> None:
        """The noise as measurements, and as floors."""
        name = self.reference.name
        again = self._release.rerun(name, "served")
        failure = self.asked[name].served_failure
        try:
            if failure is not None:
                raise MeasurementError(failure)
            self._questions.ask_documents(self.reference, OTHER_BATCHES, again)
            rerun = Rerun(first=self._release.served(name), second=again)
            source = self._release.relative(again)
            self.floors += noise_floor.floors_of_distribution(rerun, source=source)
            self.noise = tuple(noise_floor.reduce_noise(rerun, source=source))
        except MeasurementError as error:
            reason = str(error)
            self.noise = tuple(Missing(metric=m, reason=reason) for m in noise_floor.METRICS)
            metrics = (*distribution_results.METRICS, *served.METRICS)
            self.floors += noise_floor.missing_floors(metrics, reason)


def _name_of(sets: tuple[GoldenSet, ...]) -> str:
    return ", ".join(golden.name for golden in sets)
