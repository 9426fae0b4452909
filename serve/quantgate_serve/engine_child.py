"""One engine as its front sees it: started, spoken to, and gone.

It knows the requests that this engine still owes an answer, and nothing of restarts or reloads.
"""

import asyncio
import contextlib
import enum
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from quantgate_serve.channel import (
    Channel,
    ChannelClosedError,
    Counts,
    Frames,
    Loaded,
    Message,
    Refused,
    Start,
    StepReport,
    Stop,
    Warm,
    frame,
)
from quantgate_serve.config import ServerSettings
from quantgate_serve.metrics import EngineMetrics
from quantgate_serve.request import Request

_log = logging.getLogger(__name__)
_STOP_S = 10.0
_EXIT_CODE_S = 1.0


class Host(Protocol):
    """What runs the engine: a process, or a thread of this one. As subprocess.Popen has it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


Launch = Callable[[socket.socket], Host]


def launch_process(theirs: socket.socket) -> Host:
    """Run the engine in a process of its own, on its end of the socket pair.

    Raises:
        OSError: there is no memory or no process left for it.
    """
    descriptor = theirs.fileno()
    command = [sys.executable, "-m", "quantgate_serve.engine_process"]
    return subprocess.Popen(
        [*command, str(descriptor), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        pass_fds=(descriptor,),
    )


class EngineThread:
    """The engine in a thread of this process: for a debugger or a profiler, not for production.

    It shares the interpreter with the front, and what kills it kills both.
    """

    def __init__(self, theirs: socket.socket) -> None:
        # Here, not in the thread: transformers' lazy imports fail in two threads at once.
        from quantgate_serve.engine_host import host

        self._host = host
        self._socket = theirs.dup()
        self._code: int | None = None
        self.pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        return self._code

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def wait(self) -> int:
        self._thread.join(_STOP_S)
        return self._code or 0

    def _work(self) -> None:
        try:
            self._host(Channel(self._socket))
            self._code = 0
        except ChannelClosedError:
            self._code = 0
        # As a process would: it ends, and the front sees its socket close.
        except Exception as error:
            _log.error("the engine has failed", exc_info=error)
            self._code = 1
        finally:
            self._socket.close()


class ChildState(enum.Enum):
    LOADING = "loading"
    WARMING = "warming up"
    SERVING = "serving"
    GONE = "gone"


class EngineChild(asyncio.Protocol):
    """A running engine and the socket to it."""

    def __init__(
        self,
        settings: ServerSettings,
        launch: Launch,
        *,
        on_message: Callable[["EngineChild", Message], None],
        on_gone: Callable[["EngineChild"], None],
    ) -> None:
        self.settings = settings
        self.state = ChildState.LOADING
        self.in_flight: dict[int, Request] = {}
        self.counts = Counts.of(EngineMetrics())
        self.loaded: Loaded | None = None
        # Why the model can never be served, if the engine said so.
        self.refusal: str | None = None
        # When the engine last said anything, for the watchdog.
        self.heard_s = monotonic()
        # Set when it has loaded, when it serves, when it owes nothing, each also when it is lost,
        # and when nothing is left of it.
        self.has_loaded = asyncio.Event()
        self.has_warmed = asyncio.Event()
        self.has_gone = asyncio.Event()
        self.has_no_work = asyncio.Event()
        # Cleared while the counts of what was reported are on their way.
        self.has_counted = asyncio.Event()
        self.has_counted.set()
        self._launch = launch
        self._on_message = on_message
        self._on_gone = on_gone
        self._frames = Frames()
        self._host: Host | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._reaping: asyncio.Task[None] | None = None
        self._is_stopping = False

    async def start(self) -> None:
        """Start it; what it says arrives through `on_message`.

        Raises:
            OSError: it cannot be started.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._host = self._launch(theirs)
        except OSError:
            ours.close()
            raise
        ours.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        self.send(Start(self.settings))

    @property
    def pid(self) -> int | None:
        return None if self._host is None else self._host.pid

    @property
    def exit_text(self) -> str:
        """How it ended, in words."""
        code = None if self._host is None else self._host.poll()
        if code is None:
            return "its socket closed"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def send(self, message: Message) -> None:
        """Hand over `message`; to an engine that is gone it makes no difference."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def owe(self, request: Request) -> None:
        """`request` is now this engine's to answer."""
        self.in_flight[request.id] = request
        self.has_no_work.clear()

    def settle(self, request_id: int) -> Request | None:
        """The request is no longer this engine's; None if it never was."""
        request = self.in_flight.pop(request_id, None)
        if not self.in_flight:
            self.has_no_work.set()
        return request

    def kill(self) -> None:
        """End it at once; `on_gone` follows."""
        if self._host is not None and self._host.poll() is None:
            self._host.kill()

    async def drain(self) -> None:
        """Wait until it owes nothing or is gone, then end it."""
        if self.in_flight:
            await self.has_no_work.wait()
        await self.stop()

    async def stop(self) -> None:
        """Have it end after its current step, or kill it if that takes long."""
        self._is_stopping = True
        self.send(Stop())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.has_gone.wait(), _STOP_S)
        self.kill()
        await self.has_gone.wait()

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard_s = monotonic()
        for message in self._frames.feed(data):
            match message:
                case Loaded():
                    self.loaded = message
                    self.counts = Counts.of(message.metrics)
                    self.state = ChildState.WARMING
                    self.has_loaded.set()
                case Warm():
                    self.state = ChildState.SERVING
                    self.has_warmed.set()
                case Refused():
                    self.refusal = message.reason
                case StepReport(counts_follow=True):
                    self.has_counted.clear()
                case Counts():
                    self.counts = message
                    self.has_counted.set()
                case _:
                    pass
            self._on_message(self, message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.state = ChildState.GONE
        # Who was told to end, or has said why it cannot serve, has nothing to add.
        if self._is_stopping or self.refusal is not None:
            self.kill()
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        if self._host is None:
            return
        ended = asyncio.ensure_future(asyncio.to_thread(self._host.wait))
        # Mostly gone in a moment, and its own exit code says why. A process that has much memory
        # to give back takes longer, and nobody shall wait for that to be told.
        await asyncio.wait({ended}, timeout=_EXIT_CODE_S)
        self._on_gone(self)
        for event in (self.has_loaded, self.has_warmed, self.has_no_work, self.has_counted):
            event.set()
        await asyncio.wait({ended}, timeout=_STOP_S)
        self.kill()
        await ended
        self.has_gone.set()
