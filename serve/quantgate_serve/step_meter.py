"""Books what each step was: its size, its time, the model's part of it, and its least work.

The host's gap is the time with work that the model did not take: scheduling, sampling, delivery,
and whatever else the process did between two steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns

from quantgate_serve.metrics import EngineMetrics
from quantgate_serve.model_clock import ModelClock
from quantgate_serve.readout import ChunkResult
from quantgate_serve.roofline import ModelCost, step_work
from quantgate_serve.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Computed:
    """A plan that was computed, what it gave, and when."""

    plan: Sequence[Chunk]
    results: Sequence[ChunkResult]
    started_ns: int
    ended_ns: int


class StepMeter:
    """The engine's books about its steps, kept in `metrics`."""

    def __init__(
        self,
        metrics: EngineMetrics,
        clock: ModelClock,
        *,
        cost: ModelCost | None,
        max_batch_size: int,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._cost = cost
        self._max_batch_size = max_batch_size
        self._last_ns: int | None = None
        if cost is not None:
            metrics.work_bytes = metrics.work_flops = 0

    def forget(self) -> None:
        """What the model has done so far was no step (the warm-up)."""
        self._clock.take_s()

    def observe(self, computed: Computed) -> None:
        """Take a step into the books."""
        metrics, plan = self._metrics, computed.plan
        metrics.step_s.observe((computed.ended_ns - computed.started_ns) / 1e9)
        metrics.step_tokens.observe(sum([chunk.length for chunk in plan]))
        metrics.batch_size.observe(len(plan))
        metrics.batch_fill.observe(len(plan) / self._max_batch_size)
        if self._cost is not None:
            num_rows = sum(
                [
                    (result.token_id is not None) + len(result.prompt_logprobs)
                    for result in computed.results
                ]
            )
            work = step_work(
                self._cost,
                [(chunk.start, chunk.length) for chunk in plan],
                # One row is computed even where none is read.
                num_rows=max(1, num_rows),
            )
            metrics.work_bytes = (metrics.work_bytes or 0) + work.num_bytes
            metrics.work_flops = (metrics.work_flops or 0) + work.num_flops

    def end(self, *, started_ns: int, had_work: bool, has_work: bool) -> None:
        """A step that began at `started_ns` is over. Time between two busy steps is busy, too."""
        now = perf_counter_ns()
        self._metrics.model_s += self._clock.take_s()
        if had_work:
            self._metrics.busy_s += (now - (self._last_ns or started_ns)) / 1e9
        self._last_ns = now if had_work and has_work else None
