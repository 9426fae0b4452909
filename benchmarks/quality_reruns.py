"""False alarms: models against themselves at other batch sizes and orders, judged by a policy.

Every rerun asks the real server all golden sets and documents of the policy. What differs is noise,
so no gate may FAIL. Then pairs of reruns are resampled: items of 0-1 scores, clusters of the
others; single numbers (a p99, a maximum) stay as they were measured.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quantgate.gate import Gate
from quantgate.measure import Binomial, Clustered, Measurement, PairedBinary
from quantgate.plan import Plan
from quantgate.policy import SOURCE, required_gates
from quantgate.quality.completions import Batching
from quantgate.quality.distribution_results import reduce_rows
from quantgate.quality.rendering import RenderedPrompt, Renderer
from quantgate.quality.results import reduce_golden_set
from quantgate.quality.scored_tokens import compare_paths, read_scored_tokens
from quantgate.quality.served import measure_served, reduce_difference
from quantgate.quality.stage import ServedModel, measure_quality
from quantgate.server_pool import ServerPool
from quantgate.units import parse_metric
from quantgate.verdict import Outcome, judge

SEED = 20_261_124
RESAMPLES = 5_000
MIN_RERUNS = 20
"""Of all models of a policy together."""
MAX_FAIL_SHARE = 0.01
_PAIRS = 60
"""Of all pairs of reruns, those whose items are resampled."""
# Steps of the server, and prompts a request and requests in flight of the client.
_SERVERS = ((32, 512), (16, 256), (8, 512), (24, 192))
_CLIENTS = ((16, 4), (4, 3), (1, 24), (32, 2), (5, 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Under which batch sizes and in which order a model is asked."""

    max_batch_size: int
    max_batched_tokens: int
    batching: Batching

    def __str__(self) -> str:
        order = "by length" if self.batching.shuffle_seed is None else "shuffled"
        return (
            f"batches of {self.max_batch_size} requests and {self.max_batched_tokens} tokens, "
            f"{self.batching.prompts_per_request} x {self.batching.requests_in_flight} in flight, "
            f"{order}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where the results of one pass over all items lie."""

    situation: Situation
    items: dict[str, Path]
    """Parquet by golden set."""
    documents: Path | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FalseAlarms:
    """What a policy's quality gates said of a model against itself."""

    model: str
    reruns: int
    flipped_items: dict[str, int]
    """Items whose score differs from the first run's, by golden set, summed over reruns."""
    outcomes: dict[str, int]
    """Verdicts of the reruns."""
    failing_gates: dict[str, int]
    resamples: int
    failed_resamples: int
    """With any gate that FAILs."""
    seconds_per_rerun: float


def situations(count: int) -> list[Situation]:
    """The first is how a release asks; every other differs in batches, order, or both."""
    combined = itertools.cycle(itertools.product(_CLIENTS, _SERVERS))
    return [
        Situation(
            max_batch_size=batch,
            max_batched_tokens=tokens,
            batching=Batching(
                prompts_per_request=prompts,
                requests_in_flight=requests,
                shuffle_seed=None if index == 0 else index,
            ),
        )
        for index, ((prompts, requests), (batch, tokens)) in zip(
            range(count), combined, strict=False
        )
    ]


def run_all(
    plan: Plan, model: ServedModel, wanted: Sequence[Situation], *, store: Path
) -> list[Run]:
    """One server per batch size; what the store has is not asked again."""
    store.mkdir(parents=True, exist_ok=True)
    documents = _documents(plan, model)
    runs: dict[Situation, Run] = {}
    for sizes in dict.fromkeys((s.max_batch_size, s.max_batched_tokens) for s in wanted):
        options = replace(plan.server, max_batch_size=sizes[0], max_batched_tokens=sizes[1])
        with ServerPool(options, keeps_running=True) as servers:
            for situation in wanted:
                if (situation.max_batch_size, situation.max_batched_tokens) == sizes:
                    runs[situation] = _run(plan, model, situation, documents, servers, store)
                    print(
                        f"{model.name}: {runs[situation].seconds:6.1f} s  {situation}", flush=True
                    )
    return [runs[situation] for situation in wanted]


def judge_runs(plan: Plan, model: str, runs: Sequence[Run], *, num_resamples: int) -> FalseAlarms:
    """Judges each rerun against the first, then resampled pairs of any two."""
    gates = quality_gates(plan, model)
    first, *others = runs
    outcomes: Counter[str] = Counter()
    failing: Counter[str] = Counter()
    flipped: Counter[str] = Counter()
    for rerun in others:
        measured = compare_runs(plan, first, rerun)
        for metric, one in measured.items():
            if isinstance(one, PairedBinary):
                flipped[metric] += one.reference_only + one.candidate_only
        for gate in gates:
            verdict = judge(gate, measured.get(gate.metric), variant=model, baseline=model)
            outcomes[verdict.outcome] += 1
            failing[gate.id] += verdict.outcome is Outcome.FAIL
    failed = sum(resample_policy(plan, gates, runs, num_resamples=num_resamples))
    return FalseAlarms(
        model=model,
        reruns=len(others),
        flipped_items={metric: count for metric, count in flipped.items() if count},
        outcomes=dict(outcomes),
        failing_gates={gate: count for gate, count in failing.items() if count},
        resamples=num_resamples,
        failed_resamples=failed,
        seconds_per_rerun=float(np.median([run.seconds for run in others])),
    )


def quality_gates(plan: Plan, model: str) -> list[Gate]:
    """The policy's gates on quality and validity of a variant; for the source those of any scheme.

    Not those that a model cannot fail or pass against itself: what is in units of the healthy
    twin's or of the reference's has neither, a smallest KL asks for a difference, and the noise
    floor is what this measures.
    """
    gates = plan.policy.gates if model == SOURCE else required_gates(plan.policy, model)
    return [
        gate
        for gate in gates
        if (name := parse_metric(gate.metric)).section in ("quality", "validity")
        and name.stem != "noise_floor_kl_nats"
        and name.stem != "non_finite"
        and not name.noun.endswith((".healthy", ".reference", ".itself"))
        and not (name.stem == "kl_nats" and gate.direction == "min")
    ]


def compare_runs(plan: Plan, first: Run, second: Run) -> dict[str, Measurement]:
    """The second run as if it were a variant of the first."""
    measured: list[Measurement] = []
    for golden in plan.golden_sets:
        pair = first.items[golden.name], second.items[golden.name]
        measured += reduce_golden_set(golden, *pair, source=pair[1].name)
    if first.documents and second.documents:
        rows = compare_paths(
            read_scored_tokens(first.documents), read_scored_tokens(second.documents)
        )
        measured += reduce_rows(rows, source=second.documents.name)
        measured += reduce_difference(rows, "served", source=second.documents.name)
    return {one.metric: one for one in measured}


def resample_policy(
    plan: Plan, gates: Sequence[Gate], runs: Sequence[Run], *, num_resamples: int
) -> Iterator[bool]:
    """Of each resample whether any gate FAILs."""
    generator = np.random.default_rng(SEED)
    pairs = list(itertools.combinations(runs, 2))
    chosen = generator.permutation(len(pairs))[:_PAIRS]
    measured = [compare_runs(plan, *pairs[index]) for index in chosen]
    for _ in range(num_resamples):
        pair = measured[generator.integers(len(measured))]
        resampled: dict[str, Measurement] = {}
        for gate in gates:
            metric = gate.metric
            if metric in pair and metric not in resampled:
                resampled[metric] = resample(pair[metric], generator)
        yield any(fails(gate, resampled[gate.metric]) for gate in gates if gate.metric in resampled)


def resample(measurement: Measurement, generator: np.random.Generator) -> Measurement:
    """The same measurement on as many items, or clusters, drawn with replacement."""
    if isinstance(measurement, PairedBinary):
        cells = np.array(
            [
                measurement.both,
                measurement.reference_only,
                measurement.candidate_only,
                measurement.neither,
            ]
        )
        both, lost, won, neither = generator.multinomial(cells.sum(), cells / cells.sum())
        return replace(
            measurement,
            both=int(both),
            reference_only=int(lost),
            candidate_only=int(won),
            neither=int(neither),
        )
    if isinstance(measurement, Binomial):
        share = measurement.events / measurement.trials
        return replace(measurement, events=int(generator.binomial(measurement.trials, share)))
    if isinstance(measurement, Clustered):
        index = generator.integers(measurement.n, size=measurement.n)
        return replace(
            measurement,
            totals=tuple(float(t) for t in np.array(measurement.totals)[index]),
            counts=tuple(int(c) for c in np.array(measurement.counts)[index]),
        )
    return measurement


def fails(gate: Gate, measurement: Measurement) -> bool:
    """Judged in full only where it can FAIL: an interval beyond the limit holds its estimate."""
    estimate = _estimate(measurement)
    if estimate is not None:
        limit = gate.limit.to(getattr(measurement, "unit", "1"))
        if estimate <= limit if gate.direction == "max" else estimate >= limit:
            return False
    return judge(gate, measurement, variant="again", baseline="first").outcome is Outcome.FAIL


def _estimate(measurement: Measurement) -> float | None:
    """In the measurement's unit; None where judging costs nothing."""
    if isinstance(measurement, PairedBinary):
        return (measurement.candidate_only - measurement.reference_only) / measurement.n
    if isinstance(measurement, Binomial):
        return measurement.events / measurement.trials
    if isinstance(measurement, Clustered):
        mean = math.fsum(measurement.totals) / sum(measurement.counts)
        return math.exp(mean) if measurement.transform == "exp" else mean
    return None


def _run(
    plan: Plan,
    model: ServedModel,
    situation: Situation,
    documents: Sequence[RenderedPrompt],
    servers: ServerPool,
    store: Path,
) -> Run:
    log = store / "server.log"
    # So that the first pass is not charged with the server's start.
    with servers.serving(model.folder, log=log):
        started = time.perf_counter()
    answers = measure_quality(
        model,
        plan.golden_sets,
        store=store,
        log=log,
        servers=servers,
        timeout_s=plan.timeout_s * 10,
        on_answers=lambda _: None,
        batching=situation.batching,
    )
    if answers.missing:
        raise RuntimeError(f"{model.name}, {situation}: {answers.missing}")
    scored = None
    if documents and plan.policy.distribution is not None:
        scored = measure_served(
            model,
            documents,
            max_tokens=plan.policy.distribution.max_tokens,
            store=store,
            log=log,
            servers=servers,
            timeout_s=plan.timeout_s * 10,
            on_answers=lambda _: None,
            batching=situation.batching,
        )
    return Run(
        situation=situation,
        items=dict(answers.items),
        documents=scored,
        seconds=time.perf_counter() - started,
    )


def _documents(plan: Plan, model: ServedModel) -> list[RenderedPrompt]:
    if plan.documents is None:
        return []
    rendered = Renderer(model.folder).render(plan.documents)
    return [one for one in rendered if len(one.ids) >= 2]
