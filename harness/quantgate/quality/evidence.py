"""All quality layers of a release, side by side: answers, distribution, served = offline, noise.

On a CPU two things happen at a time, each on a core of its own; a GPU is not shared. Longest first,
so that no core waits for the other at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quantgate.errors import MeasurementError, UsageError
from quantgate.files import write_bytes
from quantgate.measure import Measurement, Missing
from quantgate.plan import Plan
from quantgate.policy import SOURCE, required_gates
from quantgate.progress import Progress
from quantgate.quality import distribution_results, noise_floor, served
from quantgate.quality.completions import FULL_BATCHES, Batching
from quantgate.quality.distribution import Candidate, compare_with_reference
from quantgate.quality.distribution_store import distribution_paths, group_size_of
from quantgate.quality.early_stop import StopRule, stop_rules
from quantgate.quality.noise_floor import OTHER_BATCHES, Rerun
from quantgate.quality.rendering import RenderedPrompt, Renderer
from quantgate.quality.results import metrics_of
from quantgate.quality.stage import QualityResult, ServedModel, measure_quality
from quantgate.release_folder import ReleaseFolder, store_of
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
    reference = work.reference
    others = [model for model in work.models if model.name != reference.name]
    with ThreadPoolExecutor(max_workers=plan.models_together) as pool:
        asked = {reference.name: pool.submit(work.ask_reference)}
        distribution = pool.submit(work.compare_distributions)
        # The reference is first, so whoever waits for it waits for work that has begun.
        first = asked[reference.name]
        asked |= {model.name: pool.submit(work.ask_variant, model, first) for model in others}
        asks = {name: future.result() for name, future in asked.items()}
        distribution_failures = distribution.result()
    for name, found in asks.items():
        for golden, reason in found.answers.missing.items():
            progress.note(f"{name}: {golden}: {reason.splitlines()[0]}")
        for golden, stop in found.answers.stopped.items():
            progress.note(f"{name}: {golden}: {stop}")
    return QualityEvidence(
        answers={name: found.answers for name, found in asks.items()},
        distribution_failures=distribution_failures,
        served_failures={n: f.served_failure for n, f in asks.items() if f.served_failure},
        noise=asks[reference.name].noise,
        noise_floors={floor.metric: floor for floor in asks[reference.name].floors},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What one model's server said."""

    answers: QualityResult
    served_failure: str | None
    noise: tuple[Measurement, ...] = ()
    floors: tuple[NoiseFloor, ...] = ()


class _Work:
    """The pieces of work, each to be done by one thread."""

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
        self._servers = servers
        self._progress = progress
        self._store = store_of(plan.runs) / "results"
        self._store.mkdir(parents=True, exist_ok=True)
        self.models = [
            ServedModel(name=v.name, folder=v.folder, artifact_sha256=v.manifest.artifact_sha256)
            for v in variants.values()
        ]
        if plan.policy.reference == SOURCE:
            folder, digest = plan.source.folder, plan.source.sha256
            self.models.insert(0, ServedModel(name=SOURCE, folder=folder, artifact_sha256=digest))
        self.reference = next(m for m in self.models if m.name == plan.policy.reference)
        self._max_tokens = plan.policy.distribution.max_tokens if plan.policy.distribution else 0
        self._documents = self._render_documents()

    @property
    def num_steps(self) -> int:
        """Items and documents asked, the reference's twice, and comparisons of distributions."""
        num_asked = sum(len(golden.items) for golden in self._plan.golden_sets)
        num_asked += len(self._documents)
        num_compared = len(self._variants) if self._documents else 0
        return num_asked * (len(self.models) + 1) + num_compared

    def ask_variant(self, model: ServedModel, reference: Future[_Asked]) -> _Asked:
        """As `ask`; where a gate is looked at early, once the reference's answers are there."""
        gates = [g for g in required_gates(self._plan.policy, model.name) if g.sequential]
        if not gates:
            return self.ask(model)
        return self.ask(model, stop_rules(gates, reference.result().answers.items))

    def ask(self, model: ServedModel, rules: Mapping[str, StopRule] | None = None) -> _Asked:
        """Golden sets and documents through the server."""
        answers = self._ask_golden(model, FULL_BATCHES, rules)
        for golden, path in answers.items.items():
            write_bytes(self._release.items(model.name, golden), path.read_bytes())
        failure = None
        try:
            self._ask_documents(model, FULL_BATCHES, self._release.served(model.name))
        except MeasurementError as error:
            failure = str(error)
            self._progress.note(f"{model.name}: served: {failure.splitlines()[0]}")
        return _Asked(answers=answers, served_failure=failure)

    def ask_reference(self) -> _Asked:
        """The same, and all of it again at another batch size and order."""
        model, release = self.reference, self._release
        first = self.ask(model)
        again = self._ask_golden(model, OTHER_BATCHES)
        floors: list[NoiseFloor] = []
        for golden in self._plan.golden_sets:
            name = golden.name
            reason = first.answers.missing.get(name) or again.missing.get(name)
            if reason:
                floors += noise_floor.missing_floors(metrics_of(golden), reason)
                continue
            path = release.rerun(model.name, name)
            write_bytes(path, again.items[name].read_bytes())
            floors += noise_floor.floors_of_golden_set(
                golden,
                Rerun(first=release.items(model.name, name), second=path),
                source=release.relative(path),
            )
        noise, more = self._ask_documents_again(first.served_failure)
        return _Asked(
            answers=first.answers,
            served_failure=first.served_failure,
            noise=noise,
            floors=(*floors, *more),
        )

    def compare_distributions(self) -> dict[str, str]:
        """Teacher-forced KL against the reference; returns failures by variant."""
        if not self._documents:
            return {}
        plan, progress = self._plan, self._progress
        paths = distribution_paths(plan, self._variants, self._variants, store=self._store)
        wanted = {
            name: Candidate(
                folder=variant.folder,
                scheme=plan.policy.variants[name].scheme,
                group_size=group_size_of(plan, name),
            )
            for name, variant in self._variants.items()
            if not paths[name].is_file()
        }
        if found := len(self._variants) - len(wanted):
            progress.step(found, note="distribution reused")
        failures = compare_with_reference(
            self.reference.folder,
            wanted,
            self._documents,
            out=paths,
            log=self._release.path / "distribution.log",
            device=plan.device,
            dtype=plan.dtype,
            threads=plan.server.threads,
            max_tokens=self._max_tokens,
            max_context=plan.server.max_context,
            on_done=lambda name: progress.step(note=f"{name} distribution"),
        )
        for name, path in paths.items():
            if path.is_file():
                write_bytes(self._release.distribution(name), path.read_bytes())
        for name, reason in failures.items():
            progress.note(f"{name}: {reason}")
        return failures

    def _ask_golden(
        self,
        model: ServedModel,
        batching: Batching,
        rules: Mapping[str, StopRule] | None = None,
    ) -> QualityResult:
        return measure_quality(
            model,
            self._plan.golden_sets,
            store=self._store,
            log=self._release.log(model.name),
            servers=self._servers,
            timeout_s=self._plan.timeout_s * 10,
            on_answers=self._counting(model.name),
            batching=batching,
            stop_rules=rules,
        )

    def _ask_documents(self, model: ServedModel, batching: Batching, out: Path) -> None:
        """Writes scored tokens to `out`; nothing without documents."""
        if not self._documents:
            return
        path = served.measure_served(
            model,
            self._documents,
            max_tokens=self._max_tokens,
            store=self._store,
            log=self._release.log(model.name),
            servers=self._servers,
            timeout_s=self._plan.timeout_s * 10,
            on_answers=self._counting(model.name),
            batching=batching,
        )
        write_bytes(out, path.read_bytes())

    def _ask_documents_again(
        self, failure: str | None
    ) -> tuple[tuple[Measurement, ...], tuple[NoiseFloor, ...]]:
        """The noise as measurements, and as floors."""
        if not self._documents:
            return (), ()
        name = self.reference.name
        again = self._release.rerun(name, "served")
        try:
            if failure is not None:
                raise MeasurementError(failure)
            self._ask_documents(self.reference, OTHER_BATCHES, again)
            rerun = Rerun(first=self._release.served(name), second=again)
            source = self._release.relative(again)
            floors = noise_floor.floors_of_distribution(rerun, source=source)
            return tuple(noise_floor.reduce_noise(rerun, source=source)), tuple(floors)
        except MeasurementError as error:
            reason = str(error)
            missing = tuple(Missing(metric=m, reason=reason) for m in noise_floor.METRICS)
            metrics = (*distribution_results.METRICS, *served.METRICS)
            return missing, tuple(noise_floor.missing_floors(metrics, reason))

    def _counting(self, name: str) -> Callable[[int], None]:
        return lambda count: self._progress.step(count, name)

    def _render_documents(self) -> list[RenderedPrompt]:
        """Those with a token to predict."""
        if self._plan.documents is None:
            return []
        rendered = Renderer(self.reference.folder).render(self._plan.documents)
        usable = [one for one in rendered if min(len(one.ids), self._max_tokens) >= 2]
        if not usable:
            raise UsageError("distribution: no document has two tokens, so nothing is compared.")
        return usable
