"""The engine: steps over the batch, and the one place where a failing step is contained.

Other threads hand in requests and aborts; results leave in one batch per step through `deliver`.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from time import perf_counter_ns

import torch

from quantgate_serve.admission import Admission, AdmissionLimits, QueueFullError
from quantgate_serve.memory import read_memory
from quantgate_serve.metrics import EngineMetrics, FrontMetrics
from quantgate_serve.request import (
    Delta,
    FinishReason,
    Priority,
    Request,
    RequestError,
    RequestState,
    SamplingParams,
)
from quantgate_serve.runner import ChunkResult, Runner
from quantgate_serve.scheduler import Chunk, Scheduler

_log = logging.getLogger(__name__)
Deliver = Callable[[list[Delta]], None]

# While there is work the gauges are renewed this often: reading them walks the queue.
_GAUGES_EVERY_NS = 20_000_000


class EngineStoppedError(Exception):
    """The engine has ended; nothing will be computed any more."""


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
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self.front = FrontMetrics()
        self.deliver: Deliver = call_listeners
        self._runner = runner
        self._device = device
        self._scheduler = scheduler
        self._checks_integrity = check_integrity
        self._inbox: deque[Request] = deque()
        self._aborts: deque[Request] = deque()
        self._ended: list[Delta] = []
        self._admission = Admission(limits)
        # Held while handing in, so that nothing is handed to an engine that has ended.
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._gauged_ns = 0
        self.is_warm = False
        # What ended the engine, if it did not end by stop().
        self.failure: Exception | None = None

    # Called from any thread.

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue `requests`, all or none.

        Raises:
            EngineStoppedError: the engine has ended.
            RequestTooLongError: one can never fit.
            QueueFullError: too much is queued already.
        """
        with self._lock:
            if self.failure is not None or self._stopping:
                raise EngineStoppedError("the engine has stopped; start the server again.")
            try:
                self._admission.enter(requests)
            except QueueFullError as error:
                self.front.rejections[error.reason] += 1
                raise
            self._inbox.extend(requests)
        self._wake.set()

    def abort(self, requests: Sequence[Request]) -> None:
        """Stop working on `requests` before the next step; finished ones are left alone."""
        self._aborts.extend(requests)
        self._wake.set()

    def start(self) -> None:
        """Warm up and work in a thread of its own."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; what is unfinished stays so."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_work(self) -> bool:
        return bool(self._inbox or self._aborts or self._scheduler.has_work)

    def idle_s(self) -> float | None:
        """How long there is nothing to do unless something arrives; None is for ever."""
        if not self.has_work:
            return None
        wake_ns = self._scheduler.wake_ns
        if wake_ns is None or self._inbox or self._aborts:
            return 0.0
        return max(0.0, (wake_ns - perf_counter_ns()) / 1e9)

    # The engine thread (or a test that drives it by hand).

    def step(self) -> None:
        """Take what arrived, choose a batch, compute it, move the requests on, tell listeners."""
        self._take_mail()
        plan = self._schedule()
        results = self._compute(plan)
        self._advance(results)
        self._tell(results)

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
        self.update_gauges()
        self.is_warm = True

    def _loop(self) -> None:
        try:
            self.warm_up()
            while not self._stopping:
                idle_s = self.idle_s()
                if idle_s == 0:
                    self.step()
                    continue
                if idle_s is None and self._checks_integrity:
                    self._scheduler.check_integrity()
                self._wake.wait(idle_s)
                self._wake.clear()
        # Outside a step's own boundary only a fault of the engine is left: end, and tell everyone.
        except Exception as error:
            _log.error("the engine has failed", exc_info=error)
            with self._lock:
                self.failure = error
            self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        unfinished = [*self._scheduler.running, *self._scheduler.waiting, *self._inbox]
        for request in unfinished:
            request.error = RequestError(f"the engine has failed: {error}", "engine_failed")
            request.state = RequestState.FINISHED
            request.finish_reason = FinishReason.ERROR
        deltas = [Delta(request, request.num_output, "", True) for request in unfinished]
        self.deliver(deltas)

    def _take_mail(self) -> None:
        while self._inbox:
            self._scheduler.add(self._inbox.popleft())
        while self._aborts:
            request = self._aborts.popleft()
            if not request.is_finished:
                self._finish(request, FinishReason.ABORT)

    def _schedule(self) -> list[Chunk]:
        self._expire()
        plan = self._scheduler.schedule()
        now = perf_counter_ns()
        for chunk in plan:
            request = chunk.request
            if request.scheduled_ns == 0:
                request.scheduled_ns = now
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
        self.metrics.step_s.observe((perf_counter_ns() - started) / 1e9)
        self.metrics.step_tokens.observe(sum(chunk.length for chunk in plan))
        self.metrics.batch_size.observe(len(plan))
        self.metrics.batch_fill.observe(len(plan) / self._scheduler.limits.max_batch_size)
        return results

    def _isolate(self, plan: list[Chunk], error: Exception) -> list[ChunkResult]:
        is_oom = is_out_of_memory(error)
        if is_oom:
            self.metrics.oom += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            self.metrics.step_errors += 1
            _log.error("a step of %d requests failed", len(plan), exc_info=error)
        if len(plan) == 1:
            request = plan[0].request
            request.error = _request_error(error, is_oom=is_oom)
            self._finish(request, FinishReason.ERROR)
            return []
        if is_oom:
            self.metrics.oom_retry += 1
        middle = len(plan) // 2
        return self._compute(plan[:middle]) + self._compute(plan[middle:])

    def _advance(self, results: list[ChunkResult]) -> None:
        now = perf_counter_ns()
        for result in results:
            request = result.chunk.request
            self._scheduler.commit(result.chunk)
            request.prompt_logprobs += result.prompt_logprobs
            if result.token_id is not None:
                self._append(request, result, now)
            elif request.num_uncomputed == 0:  # max_tokens=0 asks for the prompt only
                request.first_token_ns = now
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
        if request.text is not None:
            request.text.push(token)
            if request.text.is_stopped:
                self._finish(request, FinishReason.STOP)
                return
        if request.num_output >= params.max_tokens:
            self._finish(request, FinishReason.LENGTH)

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
        if request.text is not None:
            request.text.finish()
        if request.listener is not None:
            self._ended.append(Delta(request, request.num_output, _take_text(request), True))

    def _tell(self, results: list[ChunkResult]) -> None:
        deltas, self._ended = self._ended, []
        for result in results:
            request = result.chunk.request
            if request.is_streaming and result.token_id is not None and not request.is_finished:
                deltas.append(Delta(request, request.num_output, _take_text(request), False))
        now = perf_counter_ns()
        if now - self._gauged_ns >= _GAUGES_EVERY_NS or not self.has_work:
            self._gauged_ns = now
            self.update_gauges()
        if deltas:
            self.deliver(deltas)

    def update_gauges(self) -> None:
        """Note what the engine looks like now; each counter that others keep is read, too."""
        scheduler, metrics, now = self._scheduler, self.metrics, self.metrics.now
        now.num_running = scheduler.num_running
        mail = Counter(request.priority for request in tuple(self._inbox))
        now.num_waiting = {
            priority.label: scheduler.count_waiting(priority) + mail[priority]
            for priority in Priority
        }
        now.queued_tokens = self._admission.num_tokens
        now.oldest_arrived_ns = scheduler.oldest_waiting_ns
        now.service_tokens_per_s = scheduler.rate.tokens_per_s
        self._admission.tokens_per_s = now.service_tokens_per_s
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


def call_listeners(deltas: list[Delta]) -> None:
    """Tell each delta to its request's listener."""
    for delta in deltas:
        if delta.request.listener is not None:
            delta.request.listener(delta)


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has an exception for it; the CPU allocator raises a RuntimeError that says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _request_error(error: Exception, *, is_oom: bool) -> RequestError:
    if is_oom:
        return RequestError(
            "out of memory: this request does not fit even alone. Shorten it.", "out_of_memory"
        )
    return RequestError(f"the model failed on this request: {error}", "engine_error")


def _take_text(request: Request) -> str:
    return "" if request.text is None else request.text.take(final=request.is_finished)


def _warm_up_request(length: int) -> Request:
    return Request(
        prompt_ids=[0] * max(1, length), params=SamplingParams(max_tokens=3, ignore_eos=True)
    )
