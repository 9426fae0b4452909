"""The front's engine: what the routes call, whichever process computes.

Lives on the event loop. Counts the queue, turns an engine's reports into text and deltas, and
answers everyone when an engine dies.
"""

import asyncio
import copy
import logging
from collections.abc import Sequence
from time import monotonic, perf_counter_ns
from typing import Any

from quantgate_serve.admission import Admission, AdmissionLimits, QueueFullError
from quantgate_serve.channel import (
    Abort,
    Ended,
    Growth,
    Loaded,
    Message,
    StepReport,
    Submit,
    asked,
    set_progress,
    token_logprobs,
)
from quantgate_serve.config import ServerSettings
from quantgate_serve.engine_child import ChildState, EngineChild
from quantgate_serve.memory import peak_resident_bytes
from quantgate_serve.metrics import EngineMetrics, FrontMetrics
from quantgate_serve.request import Delta, FinishReason, Request, RequestError, RequestState

_log = logging.getLogger(__name__)
# What comes during the warm-up waits in the engine's queue.
_TAKES_REQUESTS = (ChildState.WARMING, ChildState.SERVING)
_WATCH_INTERVAL_S = 0.5
# A restart waits this long, twice as long after each further death, up to the last.
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 30.0
# An engine that has served for so long starts a new count of deaths.
_STEADY_S = 60.0


class EngineStoppedError(Exception):
    """There is no engine to compute it, now or any more."""


class ModelRefusedError(Exception):
    """The engine cannot serve this model; the message says why and what to do."""


class EngineClient:
    """One engine, kept alive. Every method is for the event loop's thread."""

    limits: AdmissionLimits

    def __init__(self, settings: ServerSettings) -> None:
        # What is counted here, outside the engine.
        self.front = FrontMetrics()
        # Why the server must end, once restarting is no use.
        self.failure: Exception | None = None
        self._settings = settings
        self._admission: Admission | None = None
        self._queued: set[int] = set()
        self._child: EngineChild | None = None
        # What the present engine last said, and what those before it had counted.
        self._engine_metrics = EngineMetrics()
        self._metrics_before = EngineMetrics()
        self._num_deaths = 0
        self._warm_s = 0.0
        self._is_stopping = False
        self._loaded: asyncio.Future[Loaded]
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> Loaded:
        """Start the engine's process and wait until its model is loaded; it then warms up.

        Raises:
            ModelRefusedError: the model can never be served.
            EngineStoppedError: the engine died while loading.
        """
        self._loaded = asyncio.get_running_loop().create_future()
        await self._start_child()
        loaded = await self._loaded
        self._in_background(self._watch())
        return loaded

    async def stop(self) -> None:
        """End the engine; what is unfinished is told so."""
        self._is_stopping = True
        for task in self._background:
            task.cancel()
        if self._child is not None:
            await self._child.stop()

    @property
    def is_warm(self) -> bool:
        return self._child is not None and self._child.state is ChildState.SERVING

    @property
    def is_alive(self) -> bool:
        """Whether there is an engine, or one is being restarted."""
        return self.failure is None and not self._is_stopping

    @property
    def metrics(self) -> EngineMetrics:
        """A copy of what this server's engines have counted, the present one's gauges with it.

        The peak is of device memory on CUDA; else of this process and the engine's together.
        """
        engine = copy.deepcopy(self._engine_metrics)
        engine.add(self._metrics_before)
        peak = engine.now.peak_memory_bytes
        child = self._child
        if child is not None and child.loaded is not None and child.loaded.device_type == "cpu":
            peak += peak_resident_bytes()
        engine.now.peak_memory_bytes = max(peak, self._metrics_before.now.peak_memory_bytes)
        return engine

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue `requests`, all or none.

        Raises:
            EngineStoppedError: there is no engine at the moment.
            RequestTooLongError: one can never fit.
            QueueFullError: too much is queued already.
        """
        child, admission = self._child, self._admission
        if child is None or admission is None or child.state not in _TAKES_REQUESTS:
            raise EngineStoppedError(self._stopped_text())
        try:
            admission.enter(requests)
        except QueueFullError as error:
            self.front.rejections[error.reason] += 1
            raise
        for request in requests:
            # Its text is made here, and a stop string in it ends it early.
            request.is_streaming = request.is_streaming or request.text is not None
            self._queued.add(request.id)
            child.in_flight[request.id] = request
        child.send(Submit([asked(request) for request in requests]))

    def abort(self, requests: Sequence[Request]) -> None:
        """Stop working on `requests` before the next step; finished ones are left alone."""
        unfinished = [request for request in requests if not request.is_finished]
        for request in unfinished:
            self._end(request, FinishReason.ABORT)
        if unfinished and self._child is not None:
            self._forget(self._child, unfinished, FinishReason.ABORT)

    # What the engine says.

    def _hear(self, child: EngineChild, message: Message) -> None:
        match message:
            case StepReport():
                self._take_report(child, message)
            case _:
                self._take_news(child)

    def _take_news(self, child: EngineChild) -> None:
        if child.loaded is None:
            return
        if self._admission is None:
            self._admission = Admission(child.loaded.limits)
            self.limits = child.loaded.limits
        self._engine_metrics = child.loaded.metrics
        if not self._loaded.done():
            self._loaded.set_result(child.loaded)
        if child.state is ChildState.SERVING:
            self._warm_s = monotonic()
            _log.info("the engine is warm (process %s)", child.pid)

    def _take_report(self, child: EngineChild, report: StepReport) -> None:
        if report.metrics is not None:
            self._engine_metrics = report.metrics
            if self._admission is not None:
                self._admission.tokens_per_s = report.metrics.now.service_tokens_per_s
        for id in report.started:
            self._leave_queue(child.in_flight.get(id))
        stopped: list[Request] = []
        for growth in report.grown:
            request = child.in_flight.get(growth[0])
            if request is None:
                continue
            if _grow(request, growth):
                self._end(request, FinishReason.STOP)
                stopped.append(request)
            _tell(request)
        if stopped:
            self._forget(child, stopped, FinishReason.STOP)
        for ended in report.ended:
            request = child.in_flight.pop(ended.growth[0], None)
            if request is not None:
                self._take_end(request, ended)

    def _take_end(self, request: Request, ended: Ended) -> None:
        request.prompt_logprobs += token_logprobs(ended.prompt_logprobs)
        set_progress(request, ended.progress)
        if _grow(request, ended.growth):
            request.finish_reason = FinishReason.STOP
            request.ended_by_eos = False
        if request.text is not None:
            request.text.finish()
        self._leave_queue(request)
        _tell(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        """End `request` by the front's own decision."""
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.finished_ns = perf_counter_ns()
        self._leave_queue(request)

    def _forget(self, child: EngineChild, requests: list[Request], reason: FinishReason) -> None:
        ids = [request.id for request in requests if child.in_flight.pop(request.id, None)]
        if ids:
            child.send(Abort(ids, reason))

    def _leave_queue(self, request: Request | None) -> None:
        if request is not None and request.id in self._queued and self._admission is not None:
            self._queued.discard(request.id)
            self._admission.leave(request)

    # Life and death of the engine.

    async def _start_child(self) -> None:
        self._child = EngineChild(self._settings, on_message=self._hear, on_gone=self._bury)
        await self._child.start()

    def _bury(self, child: EngineChild) -> None:
        """`child` has ended: answer everyone it owed, and start another or give up."""
        reason = f"the engine's process has ended ({child.exit_text})"
        unfinished = list(child.in_flight.values())
        child.in_flight.clear()
        for request in unfinished:
            request.error = RequestError(f"{reason}. Send the request again.", "engine_failed")
            self._end(request, FinishReason.ERROR)
            _tell(request)
        self._metrics_before, self._engine_metrics = self.metrics, EngineMetrics()
        if self._is_stopping:
            return
        if not self._loaded.done():
            error = (
                EngineStoppedError(f"{reason} while it loaded the model; see its log.")
                if child.refusal is None
                else ModelRefusedError(child.refusal)
            )
            self._loaded.set_exception(error)
            return
        _log.error("%s; %d requests were told so", reason, len(unfinished))
        if child.refusal is not None:
            self.failure = ModelRefusedError(child.refusal)
            return
        if monotonic() - self._warm_s > _STEADY_S:
            self._num_deaths = 0
        self._num_deaths += 1
        if self._num_deaths > self._settings.max_engine_restarts:
            self.failure = EngineStoppedError(
                f"{reason}, the {self._num_deaths}th time without a minute of service between."
            )
            _log.error("%s Giving up.", self.failure)
            return
        self._in_background(self._restart())

    async def _restart(self) -> None:
        delay = min(_FIRST_BACKOFF_S * 2 ** (self._num_deaths - 1), _LAST_BACKOFF_S)
        _log.info("starting the engine again in %.1f s", delay)
        await asyncio.sleep(delay)
        self.front.engine_restarts += 1
        await self._start_child()

    async def _watch(self) -> None:
        """Kill an engine that owes answers and has been silent for too long."""
        bound = self._settings.engine_timeout_s
        while True:
            await asyncio.sleep(min(_WATCH_INTERVAL_S, bound / 4))
            child = self._child
            if child is None or child.state is not ChildState.SERVING:
                continue
            if not child.in_flight:
                child.heard_s = monotonic()  # it owes nothing, so it need not say anything
            elif monotonic() - child.heard_s > bound:
                _log.error("the engine has been silent for %g s with work to do: killed", bound)
                child.kill()

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _stopped_text(self) -> str:
        if self.failure is not None or self._is_stopping:
            return "the engine has stopped; start the server again."
        return "the engine is being restarted. Try again in some seconds."


def _grow(request: Request, growth: Growth) -> bool:
    """Add tokens and text; True if a stop string ended it, which cuts what came after."""
    _, tokens, logprobs = growth
    entries = token_logprobs(logprobs)
    if request.text is None:
        request.token_ids += tokens
        request.logprobs += entries
        return False
    for index, token in enumerate(tokens):
        request.token_ids.append(token)
        if entries:
            request.logprobs.append(entries[index])
        is_end = request.ended_by_eos and index == len(tokens) - 1
        if not is_end:
            request.text.push(token)
        if request.text.is_stopped:
            return True
    return False


def _tell(request: Request) -> None:
    if request.listener is not None:
        is_last = request.is_finished
        text = "" if request.text is None else request.text.take(final=is_last)
        request.listener(Delta(request, request.num_output, text, is_last))
