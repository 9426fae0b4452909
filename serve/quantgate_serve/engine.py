"""The engine: steps over the batch, and the one place where a failing step is contained.

One thread uses it. What a step changed is its result; who is told, and how, is decided elsewhere.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np
import torch
from numpy.typing import NDArray

from quantgate_serve.admission import Admission, AdmissionLimits
from quantgate_serve.device_memory import read_memory
from quantgate_serve.finite import NonFiniteLogitsError
from quantgate_serve.metrics import EngineMetrics
from quantgate_serve.request import (
    FinishReason,
    Priority,
    Request,
    RequestError,
    SamplingParams,
)
from quantgate_serve.runner import ChunkResult, Runner
from quantgate_serve.scheduler import Chunk, Scheduler
from quantgate_serve.step_meter import StepMeter
from quantgate_serve.structured import GrammarError

_log = logging.getLogger(__name__)

# While there is work the gauges are renewed this often: reading them walks the queue.
_GAUGES_EVERY_NS = 20_000_000


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
        self._gauged_ns = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue `requests`, all or none.

        Raises:
            RequestTooLongError: one can never fit.
            QueueFullError: too much is queued already.
        """
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

    def step(self) -> Step:
        """Choose a batch, compute it, move the requests on."""
        started_ns = perf_counter_ns()
        plan = self._schedule()
        self._advance(self._compute(plan))
        self._meter.end(started_ns=started_ns, had_work=bool(plan), has_work=self.has_work)
        step, self._step = self._step, Step()
        now = perf_counter_ns()
        if now - self._gauged_ns >= _GAUGES_EVERY_NS or not self.has_work:
            self._gauged_ns = now
            self.update_gauges()
        return step

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
        if self._scheduler.prefix_cache is not None:
            self._scheduler.prefix_cache.clear()
        self._scheduler.window_waits.clear()
        self._meter.forget()
        self.update_gauges()
        self.is_warm = True

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

    def _compute(self, plan: list[Chunk]) -> list[ChunkResult]:
        """Run `plan`; if that fails, its halves; a request that fails alone is ended."""
        if not plan:
            return []
        started = perf_counter_ns()
        try:
            results = self._runner.run(plan)
        # The one boundary: whatever a step raises belongs to one request, and the loop goes on.
        except Exception as error:
            return self._isolate(plan, error)
        self._meter.observe(plan, results, started_ns=started)
        return results

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
            request.error = _request_error(error, is_oom=is_oom)
            if isinstance(error, NonFiniteLogitsError):
                self._erase(request)
            self._finish(request, FinishReason.ERROR)
            return []
        if is_oom:
            self.metrics.oom_retry += 1
        middle = len(plan) // 2
        return self._compute(plan[:middle]) + self._compute(plan[middle:])

    def _erase(self, request: Request) -> None:
        """Leave nothing of `request` in the pages that are its own: masked NaN is still NaN."""
        pool = self._scheduler.pool
        self._runner.erase([page for page in request.pages if pool.references(page) == 1])

    def _advance(self, results: list[ChunkResult]) -> None:
        now = perf_counter_ns()
        for result in results:
            request = result.chunk.request
            self._scheduler.commit(result.chunk)
            request.prompt_logprobs += result.prompt_logprobs
            if result.hidden_sum is not None:
                _add_hidden(request, result.chunk.start, result.hidden_sum)
            if result.token_id is not None:
                self._append(request, result, now)
            elif request.num_uncomputed == 0:  # max_tokens=0 asks for the prompt only
                request.first_token_ns = now
                request.embedding = _embedding(request)
                self._finish(request, FinishReason.LENGTH)

    def _append(self, request: Request, result: ChunkResult, now: int) -> None:
        token = result.token_id
        if token is None:
            return
        request.token_ids.append(token)
        if result.logprob is not None:
            request.logprobs.append(result.logprob)
        if request.first_token_ns == 0:
            request.first_token_ns = now
            self.metrics.ttft_s.observe((now - request.arrived_ns) / 1e9)
        else:
            self.metrics.inter_token_s.observe((now - request.last_token_ns) / 1e9)
        request.last_token_ns = now
        self.metrics.generation_tokens += 1
        params = request.params
        if token in request.eos_ids and not params.ignore_eos:
            request.ended_by_eos = True
            self._finish(request, FinishReason.STOP)
            return
        if request.num_output >= params.max_tokens:
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


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has an exception for it; the CPU allocator raises a RuntimeError that says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _request_error(error: Exception, *, is_oom: bool) -> RequestError:
    if isinstance(error, NonFiniteLogitsError):
        return RequestError(
            f"{error} for this request, so there is no token to choose. Other requests are not "
            "affected; the variant should be measured again.",
            "non_finite_logits",
        )
    if isinstance(error, GrammarError):
        return RequestError(f"response_format: {error}", "grammar_too_complex")
    if is_oom:
        return RequestError(
            "out of memory: this request does not fit even alone. Shorten it.", "out_of_memory"
        )
    return RequestError(f"the model failed on this request: {error}", "engine_error")


def _warm_up_request(length: int) -> Request:
    return Request(
        prompt_ids=[0] * max(1, length), params=SamplingParams(max_tokens=3, ignore_eos=True)
    )


def _add_hidden(request: Request, start: int, hidden_sum: NDArray[np.float32]) -> None:
    """Count a chunk in; one that starts at 0 begins anew, as after a preemption."""
    before = None if start == 0 else request.hidden_sum
    request.hidden_sum = hidden_sum if before is None else before + hidden_sum


def _embedding(request: Request) -> tuple[float, ...] | None:
    """The direction of the mean hidden state, as a vector of length 1."""
    if request.hidden_sum is None:
        return None
    length = float(np.linalg.norm(request.hidden_sum))
    scaled = request.hidden_sum / length if length > 0 else request.hidden_sum
    return tuple(scaled.astype(np.float32).tolist())
