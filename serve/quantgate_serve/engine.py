"""The engine: steps over the batch, and the one place where a failing step is contained.

One thread uses it. What a step changed is its result; who is told, and how, is decided elsewhere.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

import torch

from quantgate_serve.admission import Admission, AdmissionLimits
from quantgate_serve.device_memory import read_memory
from quantgate_serve.embedding import add_hidden, embedding_of
from quantgate_serve.failures import is_out_of_memory, request_error
from quantgate_serve.finite import NonFiniteLogitsError
from quantgate_serve.metrics import EngineMetrics
from quantgate_serve.readout import ChunkResult
from quantgate_serve.request import (
    FinishReason,
    Priority,
    Request,
    RequestError,
    SamplingParams,
)
from quantgate_serve.runner import Collect, Runner
from quantgate_serve.scheduler import Chunk, Scheduler
from quantgate_serve.step_meter import Computed, StepMeter
from quantgate_serve.structured import GrammarError

_log = logging.getLogger(__name__)

# While there is work the gauges are renewed this often, as often as they are sent to the front:
# reading them walks the queue.
_GAUGES_EVERY_NS = 100_000_000


@dataclass(slots=True)
class Step:
    """What one step changed: requests first computed, streams that go on, and those that ended."""

    started: list[Request] = field(default_factory=list)
    grown: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)


class Engine:
    """Requests in, tokens out."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        metrics: EngineMetrics,
        *,
        limits: AdmissionLimits,
        device: torch.device,
        check_integrity: bool = False,
        meter: StepMeter,
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self.is_warm = False
        self._runner = runner
        self._device = device
        self._meter = meter
        self._scheduler = scheduler
        self._checks_integrity = check_integrity
        self._admission = Admission(limits)
        # What has changed since the last step's result.
        self._step = Step()
        # Computed steps that are not in the books yet: where the runner overlaps, the next one's
        # computation is the time for that.
        self._unbooked: list[Computed] = []
        self._gauged_ns = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue `requests`, all or none.

        Raises:
            RequestTooLongError: one can never fit.
            QueueFullError: too much is queued already.
        """
        if not self.has_work:
            # What was read at the end of the work before holds, and these need not wait for more.
            self._gauged_ns = perf_counter_ns()
        self._admission.enter(requests)
        for request in requests:
            self._scheduler.add(request)

    def abort(
        self, requests: Sequence[Request], *, reason: FinishReason = FinishReason.ABORT
    ) -> None:
        """End `requests` now and free their pages; finished ones are left alone."""
        for request in requests:
            if not request.is_finished:
                self._finish(request, reason)

    @property
    def has_work(self) -> bool:
        return bool(self._step.ended or self._scheduler.has_work)

    def idle_s(self) -> float | None:
        """How long there is nothing to do unless something arrives; None is for ever."""
        if not self.has_work:
            return None
        wake_ns = self._scheduler.wake_ns
        if wake_ns is None or self._step.ended:
            return 0.0
        return max(0.0, (wake_ns - perf_counter_ns()) / 1e9)

    def rest(self) -> None:
        """Called before a wait without end: look after every page, if asked to."""
        if self._checks_integrity:
            self._scheduler.check_integrity()

    @property
    def overlaps(self) -> bool:
        """Whether step() has time for something else while the device computes."""
        return self._runner.overlaps

    def step(self) -> Step:
        """Choose a batch, compute it, move the requests on, count."""
        step = self.compute()
        self.note()
        return step

    def compute(self, meanwhile: Callable[[], None] | None = None) -> Step:
        """A step but for the counting, which note() does: nobody's answer need wait for that.

        `meanwhile` is called once, while the batch is computed if the runner overlaps; it must not
        touch the requests.
        """
        started_ns = perf_counter_ns()
        plan = self._schedule()
        collect = self._launch(plan)
        self._book()
        if meanwhile is not None:
            meanwhile()
        self._advance(collect())
        has_work = self._scheduler.has_work
        self._meter.end(started_ns=started_ns, had_work=bool(plan), has_work=has_work)
        step, self._step = self._step, Step()
        return step

    def note(self) -> None:
        """Count what the step before brought, and now and then what the engine looks like."""
        if not (self.overlaps and self._scheduler.has_work):
            self._book()
        now = perf_counter_ns()
        if now - self._gauged_ns >= _GAUGES_EVERY_NS or not self.has_work:
            self._gauged_ns = now
            self.update_gauges()

    def warm_up(self) -> None:
        """Compute prompts and decodes of two batch sizes, so that no client pays for it."""
        largest = min(self._scheduler.limits.max_batch_size, 8)
        for count in (1, largest):
            length = min(24, self.limits.max_request_tokens - 4)
            requests = [_warm_up_request(length) for _ in range(count)]
            for request in requests:
                self._scheduler.add(request)
            while self._scheduler.has_work:
                plan = self._scheduler.schedule()
                # The admission window may hold the first ones back for a moment.
                for result in self._runner.run(plan) if plan else ():
                    request = result.chunk.request
                    self._scheduler.commit(result.chunk)
                    if result.token_id is not None:
                        request.token_ids.append(result.token_id)
                        if request.num_output >= request.params.max_tokens:
                            self._scheduler.finish(request, FinishReason.LENGTH)
        self._forget()
        self.update_gauges()
        self.is_warm = True

    def _forget(self) -> None:
        """What the warm-up left and counted: no client asked for it."""
        scheduler, runner = self._scheduler, self._runner
        if scheduler.prefix_cache is not None:
            scheduler.prefix_cache.clear()
            scheduler.prefix_cache.queried_tokens = scheduler.prefix_cache.hit_tokens = 0
        scheduler.window_waits.clear()
        scheduler.num_preemptions = 0
        runner.padded_pages = runner.used_pages = 0
        if self.metrics.graph_hits is not None:
            self.metrics.graph_hits = 0
        if self.metrics.graph_misses is not None:
            self.metrics.graph_misses.clear()
        self._meter.forget()

    def _schedule(self) -> list[Chunk]:
        self._expire()
        plan = self._scheduler.schedule()
        now = perf_counter_ns()
        for chunk in plan:
            request = chunk.request
            if request.scheduled_ns == 0:
                request.scheduled_ns = now
                self._step.started.append(request)
                self._admission.leave(request)
                self.metrics.observe_wait(request.priority.label, (now - request.arrived_ns) / 1e9)
                self.metrics.prompt_tokens += request.num_prompt
        return plan

    def _expire(self) -> None:
        for request in self._scheduler.take_expired():
            phase = "running" if request.scheduled_ns else "queued"
            self.metrics.deadline_expired[phase] += 1
            request.error = RequestError(
                f"the deadline passed while the request was {phase}, after "
                f"{(perf_counter_ns() - request.arrived_ns) / 1e9:.3f} s. "
                "Allow more time, or ask for fewer tokens.",
                "deadline_exceeded",
            )
            self._finish(request, FinishReason.ERROR)

    def _launch(self, plan: list[Chunk]) -> Collect:
        """Begin to compute `plan`. What is returned waits for it; if it fails, for its halves, and
        a request that fails alone is ended."""
        if not plan:
            return list
        started = perf_counter_ns()
        try:
            collect = self._runner.launch(plan)
            if self._runner.overlaps:
                self._runner.foresee(self._scheduler.foresee(plan))
        # With the one in _collect the boundary: whatever a step raises belongs to one request, and
        # the loop goes on.
        except Exception as error:
            failure = error
            return lambda: self._isolate(plan, failure)
        return lambda: self._collect(plan, collect, started_ns=started)

    def _collect(
        self, plan: list[Chunk], collect: Collect, *, started_ns: int
    ) -> list[ChunkResult]:
        try:
            results = collect()
        except Exception as error:
            return self._isolate(plan, error)
        self._unbooked.append(Computed(plan, results, started_ns, perf_counter_ns()))
        return results

    def _book(self) -> None:
        for computed in self._unbooked:
            self._meter.observe(computed)
        self._unbooked.clear()

    def _isolate(self, plan: list[Chunk], error: Exception) -> list[ChunkResult]:
        is_oom = is_out_of_memory(error)
        if is_oom:
            self.metrics.oom += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        # A client's schema that asks for more work than is allowed is no failure of the engine.
        elif not isinstance(error, GrammarError):
            self.metrics.step_errors += 1
            _log.error("a step of %d requests failed", len(plan), exc_info=error)
        if len(plan) == 1:
            request = plan[0].request
            request.error = request_error(error, is_oom=is_oom)
            if isinstance(error, NonFiniteLogitsError):
                self._erase(request)
            self._finish(request, FinishReason.ERROR)
            return []
        if is_oom:
            self.metrics.oom_retry += 1
        middle = len(plan) // 2
        return self._launch(plan[:middle])() + self._launch(plan[middle:])()

    def _erase(self, request: Request) -> None:
        """Leave nothing of `request` in the pages that are its own: masked NaN is still NaN."""
        pool = self._scheduler.pool
        self._runner.erase([page for page in request.pages if pool.references(page) == 1])

    def _advance(self, results: list[ChunkResult]) -> None:
        now = perf_counter_ns()
        # Most requests of a step had their last token at the same time: they are counted at once.
        last_token_ns: dict[int, int] = {}
        num_tokens = 0
        for result in results:
            chunk = result.chunk
            request = chunk.request
            self._scheduler.commit(chunk)
            if not request.params.is_plain:
                self._add_what_was_asked(request, result, now)
            token = result.token_id
            if token is None:
                continue
            num_tokens += 1
            request.token_ids.append(token)
            then = request.last_token_ns
            if then:
                last_token_ns[then] = last_token_ns.get(then, 0) + 1
            else:
                request.first_token_ns = now
                self.metrics.ttft_s.observe((now - request.arrived_ns) / 1e9)
            request.last_token_ns = now
            self._end_or_go_on(request, token)
        self.metrics.generation_tokens += num_tokens
        for then, count in last_token_ns.items():
            self.metrics.inter_token_s.observe((now - then) / 1e9, count)

    def _add_what_was_asked(self, request: Request, result: ChunkResult, now: int) -> None:
        """What a step gave besides its token."""
        if result.prompt_logprobs:
            request.prompt_logprobs += result.prompt_logprobs
        if result.logprob is not None:
            request.logprobs.append(result.logprob)
        if result.hidden_sum is not None:
            add_hidden(request, result.chunk.start, result.hidden_sum)
        if result.token_id is None and request.num_uncomputed == 0:
            # max_tokens=0 asks for the prompt only
            request.first_token_ns = now
            request.embedding = embedding_of(request)
            self._finish(request, FinishReason.LENGTH)

    def _end_or_go_on(self, request: Request, token: int) -> None:
        params = request.params
        if not params.ignore_eos and token in request.eos_ids:
            request.ended_by_eos = True
            self._finish(request, FinishReason.STOP)
        elif len(request.token_ids) - len(request.prompt_ids) >= params.max_tokens:
            self._finish(request, FinishReason.LENGTH)
        elif request.is_streaming:
            self._step.grown.append(request)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._scheduler.finish(request, reason)
        now = perf_counter_ns()
        request.finished_ns = now
        if request.scheduled_ns == 0:
            self._admission.leave(request)
        elif request.first_token_ns and reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.metrics.prefill_s.observe((request.first_token_ns - request.scheduled_ns) / 1e9)
            self.metrics.decode_s.observe((now - request.first_token_ns) / 1e9)
            self.metrics.inference_s.observe((now - request.scheduled_ns) / 1e9)
            self.metrics.e2e_s.observe((now - request.arrived_ns) / 1e9)
            self.metrics.request_prompt_tokens.observe(request.num_prompt)
            self.metrics.request_generation_tokens.observe(request.num_output)
        self.metrics.finished[reason] += 1
        self._step.ended.append(request)

    def update_gauges(self) -> None:
        """Note what the engine looks like now; each counter that others keep is read, too."""
        scheduler, metrics, now = self._scheduler, self.metrics, self.metrics.now
        now.num_running = scheduler.num_running
        now.num_waiting = {
            priority.label: scheduler.count_waiting(priority) for priority in Priority
        }
        now.queued_tokens = self._admission.num_tokens
        now.oldest_arrived_ns = scheduler.oldest_waiting_ns
        now.service_tokens_per_s = scheduler.rate.tokens_per_s
        now.service_s_per_step = scheduler.rate.s_per_step
        now.kv_pages = scheduler.pool.num_pages
        now.kv_pages_used = scheduler.pool.num_used
        now.kv_pages_cached = scheduler.pool.num_cached
        read_memory(now, self._device)
        metrics.preemptions = scheduler.num_preemptions
        metrics.aging_promotions = scheduler.num_aged
        metrics.gathered_pages = self._runner.padded_pages
        metrics.needed_pages = self._runner.used_pages
        for seconds in scheduler.window_waits:
            metrics.window_wait_s.observe(seconds)
        scheduler.window_waits.clear()
        if scheduler.prefix_cache is not None:
            metrics.cross_tenant_hits = scheduler.prefix_cache.cross_tenant_hits
            metrics.prefix_queries = scheduler.prefix_cache.queried_tokens
            metrics.prefix_hits = scheduler.prefix_cache.hit_tokens


def _warm_up_request(length: int) -> Request:
    return Request(
        prompt_ids=[0] * max(1, length), params=SamplingParams(max_tokens=3, ignore_eos=True)
    )
