"""One engine process as its front sees it: started, spoken to, and gone.

It knows the requests that this engine still owes an answer, and nothing of restarts or reloads.
"""

import asyncio
import contextlib
import enum
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from time import monotonic

from quantgate_serve.channel import Frames, Loaded, Message, Refused, Start, Stop, Warm, frame
from quantgate_serve.config import ServerSettings
from quantgate_serve.request import Request

_STOP_S = 10.0


class ChildState(enum.Enum):
    LOADING = "loading"
    WARMING = "warming up"
    SERVING = "serving"
    GONE = "gone"


class EngineChild(asyncio.Protocol):
    """A running engine process and the socket to it."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        on_message: Callable[["EngineChild", Message], None],
        on_gone: Callable[["EngineChild"], None],
    ) -> None:
        self.settings = settings
        self.state = ChildState.LOADING
        self.in_flight: dict[int, Request] = {}
        self.loaded: Loaded | None = None
        # Why the model can never be served, if the engine said so.
        self.refusal: str | None = None
        # When the engine last said anything, for the watchdog.
        self.heard_s = monotonic()
        self._on_message = on_message
        self._on_gone = on_gone
        self._frames = Frames()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._gone = asyncio.Event()

    async def start(self) -> None:
        """Start the process; what it says arrives through `on_message`."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            command = [sys.executable, "-m", "quantgate_serve.engine_process"]
            self._process = subprocess.Popen(
                [*command, str(descriptor), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(descriptor,),
            )
        ours.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        self.send(Start(self.settings))

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def exit_text(self) -> str:
        """How the process ended, in words."""
        code = None if self._process is None else self._process.poll()
        if code is None:
            return "its socket closed"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def send(self, message: Message) -> None:
        """Hand over `message`; to an engine that is gone it makes no difference."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def kill(self) -> None:
        """End it at once; `on_gone` follows."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    async def stop(self) -> None:
        """Have it end after its current step, or kill it if that takes long."""
        self.send(Stop())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), _STOP_S)
        self.kill()
        await self._gone.wait()

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
                    self.state = ChildState.WARMING
                case Warm():
                    self.state = ChildState.SERVING
                case Refused():
                    self.refusal = message.reason
                case _:
                    pass
            self._on_message(self, message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.state = ChildState.GONE
        self.kill()
        asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        if self._process is not None:
            # A process that closed its socket or was killed is gone in a moment.
            await asyncio.to_thread(self._process.wait)
        self._gone.set()
        self._on_gone(self)
