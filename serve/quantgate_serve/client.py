"""The front's engine: what the routes call, whichever process computes.

Lives on the event loop. Hands requests to the engine that serves, answers everyone when an engine
dies, starts the next one, and changes engines without losing a request. What becomes of a request
is in ledger.py.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from time import monotonic, perf_counter_ns
from typing import Any

from quantgate_serve.admission import AdmissionLimits
from quantgate_serve.channel import Counts, Loaded, Message, StepReport, Submit, asked
from quantgate_serve.config import ServerSettings
from quantgate_serve.engine_child import ChildState, EngineChild, Launch, launch_process
from quantgate_serve.ledger import Ledger
from quantgate_serve.metrics import EngineMetrics, FrontMetrics
from quantgate_serve.request import FinishReason, Request
from quantgate_serve.restarts import Restarts
from quantgate_serve.room import fits_beside
from quantgate_serve.tally import Tally

_log = logging.getLogger(__name__)
# What comes during the warm-up waits in the engine's queue.
_TAKES_REQUESTS = (ChildState.WARMING, ChildState.SERVING)
_WATCH_INTERVAL_S = 0.5
# The counts follow a report at once. An engine that hangs meanwhile shall not hold up a scrape.
_COUNTS_S = 1.0


class EngineStoppedError(Exception):
    """There is no engine to compute it, now or any more."""


class ModelRefusedError(Exception):
    """The engine cannot serve this model; the message says why and what to do."""


class EngineClient:
    """One engine, kept alive. Every method but `metrics` is for the event loop's thread."""

    limits: AdmissionLimits

    def __init__(self, settings: ServerSettings, *, launch: Launch = launch_process) -> None:
        # What is counted here, outside the engine.
        self.front = FrontMetrics(slo_baselines=dict(settings.slo))
        self._ledger = Ledger(self.front)
        # Why the server must end, once restarting is no use.
        self.failure: Exception | None = None
        # Grows with each change of weights: what was computed with others is void.
        self.epoch = 0
        self.settings = settings
        self._launch = launch
        self._serving: EngineChild | None = None
        # Coming up to take over, or finishing what it owes.
        self._others: list[EngineChild] = []
        # New requests wait here while one engine must end before the next can load.
        self._held: dict[int, Request] | None = None
        self._tally = Tally()
        self._restarts = Restarts(settings.max_engine_restarts)
        self._is_stopping = False
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> Loaded:
        """Start the engine and wait until its model is loaded; it then warms up.

        Raises:
            ModelRefusedError: the model can never be served.
            EngineStoppedError: the engine died while loading.
        """
        child = self._new_child(self.settings)
        self._serving = child
        try:
            await child.start()
        except OSError as error:
            raise EngineStoppedError(f"the engine cannot be started: {error}") from error
        self._in_background(self._watch())
        await child.has_loaded.wait()
        if child.loaded is None:
            raise self.failure or EngineStoppedError("stopped while loading")
        return child.loaded

    async def stop(self) -> None:
        """End the engine; what is unfinished is told so."""
        self._is_stopping = True
        for task in self._background:
            task.cancel()
        await asyncio.gather(*(child.stop() for child in self._children() if child.pid))

    @property
    def on_ended(self) -> list[Callable[[Request], None]]:
        """Called with each request that was queued, once, when it has ended."""
        return self._ledger.on_ended

    @property
    def loaded(self) -> Loaded | None:
        """The model that serves now; None while there is none."""
        return None if self._serving is None else self._serving.loaded

    @property
    def is_warm(self) -> bool:
        """Whether requests are taken now; while one engine replaces another they are."""
        child = self._serving
        return child is not None and (child.state is ChildState.SERVING or self._held is not None)

    @property
    def is_alive(self) -> bool:
        """Whether there is an engine, or one is being restarted."""
        return self.failure is None and not self._is_stopping

    @property
    def metrics(self) -> EngineMetrics:
        """A copy of what this server's engines have counted, with the gauges of the serving one.

        The peak is of device memory on CUDA; else of the resident memory of this process and the
        engine's together, and of both engines while one replaces the other.
        """
        return self._tally.total(list(self._children()), self._serving)

    async def count(self) -> None:
        """Wait until `metrics` has counted whatever was answered; for no step, so not for long."""
        for child in list(self._children()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.has_counted.wait(), _COUNTS_S)

    @property
    def in_flight(self) -> list[Request]:
        """Requests that have not ended, in the order in which they came."""
        held = [] if self._held is None else list(self._held.values())
        return [*(r for child in self._children() for r in child.in_flight.values()), *held]

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue `requests`, all or none.

        Raises:
            EngineStoppedError: there is no engine at the moment.
            RequestTooLongError: one can never fit.
            QueueFullError: too much is queued already.
        """
        child = self._serving
        is_taking = self._held is not None or (child and child.state in _TAKES_REQUESTS)
        if child is None or not self._ledger.is_open or not is_taking or not self.is_alive:
            raise EngineStoppedError(self._stopped_text())
        self._ledger.enter(requests)
        if self._held is not None:
            self._held |= {request.id: request for request in requests}
            return
        # Its first step's report would wake this process beside a model that has all cores, to
        # say what is known.
        is_alone = len(requests) == 1 and not child.in_flight and child.state is ChildState.SERVING
        _hand_over(child, requests, starts_at_once=is_alone)
        if is_alone:
            self._ledger.start(requests[0], perf_counter_ns())

    def abort(self, requests: Sequence[Request]) -> None:
        """Stop working on `requests` before the next step; finished ones are left alone."""
        unfinished = [request for request in requests if not request.is_finished]
        for request in unfinished:
            self._ledger.end(request, FinishReason.ABORT)
            if self._held is not None:
                self._held.pop(request.id, None)
        for child in self._children():
            self._ledger.forget(child, unfinished, FinishReason.ABORT)

    async def replace(self, settings: ServerSettings) -> str:
        """Serve other weights from now on; no request fails of it. Gives what happened, in words.

        The new engine loads and warms up beside the old one if memory allows; else new requests
        wait until the old one has answered what it owes and the new one is warm.

        Raises:
            ModelRefusedError, EngineStoppedError: the new engine cannot serve; the old one does.
        """
        old = self._serving
        if old is None or old.state is not ChildState.SERVING or old.loaded is None:
            raise EngineStoppedError(f"nothing to replace: {self._stopped_text()}")
        if self._others:
            raise EngineStoppedError("another replacement is under way. Try again when it is done.")
        refused = fits_beside(old.loaded, old.settings, settings)
        if refused is None:
            await self._take_over(settings)
            return "the new weights were loaded beside the old ones"
        _log.info("%s: new requests wait until the old engine is drained", refused)
        await self._replace_after(old, settings)
        return f"the old engine was drained first ({refused})"

    async def _replace_after(self, old: EngineChild, settings: ServerSettings) -> None:
        self._held = {}
        self._others.append(old)
        try:
            await old.drain()
            await self._take_over(settings)
        except (ModelRefusedError, EngineStoppedError):
            _log.error("the new weights cannot be served; loading the old ones again")
            await self._take_over(old.settings)
            raise
        finally:
            held, self._held = list(self._held.values()), None
            child = self._serving
            if child is not None and child.state is ChildState.SERVING:
                _hand_over(child, held)
            else:
                self._ledger.fail(held, "neither the new weights nor the old ones can be loaded")
                if not self._is_stopping:
                    self.failure = EngineStoppedError("no weights can be loaded any more.")

    async def _take_over(self, settings: ServerSettings) -> None:
        """Load and warm up an engine, have it serve, and let the one before it finish."""
        child = self._new_child(settings)
        self._others.append(child)
        try:
            await self._warm(child)
        finally:
            if child in self._others:
                self._others.remove(child)
        # Not always the engine that served when this began: that may have died and come again.
        before = self._serving
        self._switch(child)
        if before is not None and before.state is not ChildState.GONE:
            self._others.append(before)
            self._in_background(before.drain())

    async def _warm(self, child: EngineChild) -> None:
        try:
            await child.start()
        except OSError as error:
            raise EngineStoppedError(f"the engine cannot be started: {error}") from error
        await child.has_warmed.wait()
        if child.state is not ChildState.SERVING:
            if child.refusal is not None:
                raise ModelRefusedError(child.refusal)
            raise EngineStoppedError(f"the new engine ended while it loaded ({child.exit_text}).")

    def _switch(self, child: EngineChild) -> None:
        assert child.loaded is not None
        self.settings = child.settings
        self._serving = child
        self.epoch += 1
        self._limit(child.loaded.limits)
        self._restarts.serve(monotonic())
        _log.info("serving %s (process %s)", child.settings.model, child.pid)

    # What the engine says.

    def _hear(self, child: EngineChild, message: Message) -> None:
        match message:
            case StepReport():
                self._ledger.take(child, message)
            case Counts():
                if child is self._serving:
                    self._ledger.pace(message)
            case Loaded() if child is self._serving:
                self._limit(message.limits)
            case _ if child is self._serving and child.state is ChildState.SERVING:
                self._restarts.serve(monotonic())
                _log.info("the engine is warm (process %s)", child.pid)
            case _:
                pass

    def _limit(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self._ledger.limit(limits)

    # Life and death of engines.

    def _children(self) -> Iterator[EngineChild]:
        if self._serving is not None:
            yield self._serving
        yield from (child for child in self._others if child is not self._serving)

    def _new_child(self, settings: ServerSettings) -> EngineChild:
        return EngineChild(settings, self._launch, on_message=self._hear, on_gone=self._bury)

    def _bury(self, child: EngineChild) -> None:
        """`child` has ended: answer everyone it owed, and start another or give up."""
        reason = f"the engine's process has ended ({child.exit_text})"
        unfinished = [child.settle(id) for id in list(child.in_flight)]
        self._ledger.fail([request for request in unfinished if request is not None], reason)
        self._tally.keep(child, peak_bytes=self.metrics.now.peak_memory_bytes)
        if child in self._others:
            self._others.remove(child)
            return
        if self._is_stopping or self._held is not None:
            return
        if child.refusal is not None:
            self.failure = ModelRefusedError(child.refusal)
            return
        if not self._ledger.is_open:
            self.failure = EngineStoppedError(f"{reason} while it loaded the model; see its log.")
            return
        _log.error("%s; %d requests were told so", reason, len(unfinished))
        pause_s = self._restarts.die(monotonic())
        if pause_s is None:
            self.failure = EngineStoppedError(
                f"{reason}; it has died {self._restarts.num_deaths} times without a minute of "
                "service between. Giving up."
            )
            return
        self._in_background(self._restart(child, pause_s))

    async def _restart(self, dead: EngineChild, pause_s: float) -> None:
        _log.info("starting the engine again in %.1f s", pause_s)
        await asyncio.sleep(pause_s)
        await dead.has_gone.wait()  # with the memory that it held
        if self._serving is not dead:
            return  # replaced meanwhile
        self.front.engine_restarts += 1
        self._serving = self._new_child(dead.settings)
        try:
            await self._serving.start()
        except OSError as error:
            self.failure = EngineStoppedError(f"the engine cannot be started again: {error}")

    async def _watch(self) -> None:
        """Kill an engine that loads, or owes answers, and has been silent for too long."""
        while True:
            await asyncio.sleep(min(_WATCH_INTERVAL_S, self.settings.engine_timeout_s / 4))
            self._expire()
            now = monotonic()
            for child in self._children():
                if child.state is ChildState.SERVING and not child.in_flight:
                    child.heard_s = now  # it owes nothing, so it need not say anything
                bound_s = (
                    child.settings.engine_timeout_s
                    if child.state is ChildState.SERVING
                    else child.settings.engine_start_timeout_s
                )
                if child.state is not ChildState.GONE and now - child.heard_s > bound_s:
                    _log.error("the engine has been silent for %g s: killed", bound_s)
                    child.kill()

    def _expire(self) -> None:
        """End who has run out of time where no engine looks yet: before one is warm."""
        waiting = {} if self._held is None else dict(self._held)
        for child in self._children():
            if child.state is ChildState.WARMING:
                waiting |= child.in_flight
        now = perf_counter_ns()
        late = [r for r in waiting.values() if r.deadline_ns is not None and r.deadline_ns <= now]
        if self._held is not None:
            self._held = {id: r for id, r in self._held.items() if r not in late}
        for child in self._children():
            self._ledger.forget(child, late, FinishReason.ABORT)
        self._ledger.expire(late)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _stopped_text(self) -> str:
        if not self.is_alive:
            return "the engine has stopped; start the server again."
        return "the engine is being restarted. Try again in some seconds."


def _hand_over(
    child: EngineChild, requests: Sequence[Request], *, starts_at_once: bool = False
) -> None:
    for request in requests:
        child.owe(request)
    child.send(Submit([asked(request) for request in requests], starts_at_once))
