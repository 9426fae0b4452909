"""A client's connection: HTTP/1.1 in and out, with bounds on how slow a client may be.

A connection that sends its headers drop by drop, or never reads its answer, costs a socket and
memory for as long as it likes. Uvicorn accepts connections and drains them; what it has for HTTP
knows no such bounds, and takes a third of the front's time for an idle request (h11), or loses the
body of a request that offers an upgrade (httptools).

One request is answered at a time. What a client sends behind it stays bytes until its turn comes.
"""

import asyncio
import http
import json
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from quantgate_serve.http.chunks import Chunks
from quantgate_serve.http.errors import ApiError
from quantgate_serve.http.head import MAX_HEAD_BYTES, BadRequestError, Head, find_end, parse_head
from quantgate_serve.http.turn import Turn


class Clock:
    """Does something once, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        return self._timer is not None

    def start(self, seconds: float, then: Callable[[], object]) -> None:
        self.stop()
        self._timer = self._loop.call_later(seconds, self._ring, then)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self, then: Callable[[], object]) -> None:
        self._timer = None
        then()


class Connection(asyncio.Protocol):
    """One client's connection, as uvicorn's servers start it; `of` makes the class for bounds."""

    # From a connection's start, a request's first byte, or the end of the answer before it, to the
    # end of its headers.
    headers_timeout_s = 20.0
    # How long what waits to be read may stay above the transport's high-water mark.
    read_timeout_s = 60.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._app: ASGIApp = config.loaded_app
        self._loop = asyncio.get_running_loop()
        self._server = server_state
        del app_state, _loop  # of a lifespan, and of the loop that runs anyway: not used here
        self._keep_alive_s = config.timeout_keep_alive
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._names: dict[str, Any] = {}
        # Received and not understood yet; of it the bytes that hold no end of a head.
        self._unread = b""
        self._searched = 0
        self._is_reading = True
        self._turn: Turn | None = None
        # What is left of the body of the request that came last.
        self._body: int | Chunks = 0
        self._writable: asyncio.Event | None = None
        # Of a head, or of the rest of a body that nobody needs.
        self._head_clock = Clock(self._loop)
        # Of the pause before the next request.
        self._idle_clock = Clock(self._loop)
        # Of an answer that is not read.
        self._read_clock = Clock(self._loop)

    @classmethod
    def of(cls, *, headers_timeout_s: float, read_timeout_s: float) -> "type[Connection]":
        bounds = {"headers_timeout_s": headers_timeout_s, "read_timeout_s": read_timeout_s}
        return type(cls.__name__, (cls,), bounds)

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.connections.add(self)  # type: ignore[arg-type]
        self._names = {
            "server": _address(transport.get_extra_info("sockname")),
            "client": _address(transport.get_extra_info("peername")),
            "scheme": "http",
        }
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._head_clock.stop()
        self._idle_clock.stop()
        self.resume_writing()
        if self._turn is not None:
            self._turn.leave()

    def data_received(self, data: bytes) -> None:
        self._unread = self._unread + data if self._unread else data
        self._read()

    def pause_writing(self) -> None:
        self._writable = asyncio.Event()
        # Not close(): that would wait for the client to read what it does not read.
        self._read_clock.start(self.read_timeout_s, self._transport.abort)

    def resume_writing(self) -> None:
        self._read_clock.stop()
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    # uvicorn's side.

    def shutdown(self) -> None:
        """Take no more requests; the one under way gets its answer."""
        if self._turn is None:
            self._transport.close()
        else:
            self._turn.keeps_alive = False

    # The turn's side.

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return self._server.default_headers

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    @property
    def is_writable(self) -> bool:
        return self._writable is None

    async def writable(self) -> None:
        if self._writable is not None:
            await self._writable.wait()

    def wants_body(self) -> None:
        self._resume_reading()

    def answered(self, *, keeps_alive: bool) -> None:
        self._turn = None
        self._server.total_requests += 1
        if not keeps_alive:
            self._transport.close()
        elif not self._transport.is_closing():
            self._resume_reading()
            if self._body:
                # Read on and thrown away, until the next request can begin.
                self._head_clock.start(self.headers_timeout_s, self._transport.close)
            # Not from inside the turn that has just ended.
            self._loop.call_soon(self._read)

    def break_off(self) -> None:
        self._turn = None
        self._transport.close()

    # Reading.

    def _read(self) -> None:
        """Understand what has come, as far as it is somebody's turn."""
        try:
            while not self._transport.is_closing():
                if self._body:
                    if not self._read_body():
                        break
                elif self._turn is not None or not self._read_head():
                    break
        except BadRequestError as error:
            self._refuse(ApiError(error.status, str(error), code="invalid_http"))
            return
        if self._turn is not None and not self._body and len(self._unread) > MAX_HEAD_BYTES:
            self._pause_reading()

    def _read_head(self) -> bool:
        """Begin a turn; False while its head has not come."""
        if not self._unread:
            # The pause between two requests is no slow request.
            if not (self._head_clock.is_running or self._idle_clock.is_running):
                self._idle_clock.start(self._keep_alive_s, self._transport.close)
            return False
        self._idle_clock.stop()
        end = find_end(self._unread, self._searched)
        if end is None:
            self._searched = len(self._unread)
            if not self._head_clock.is_running:
                self._watch_head()
            return False
        self._head_clock.stop()
        head = parse_head(self._unread[:end])
        self._unread, self._searched = self._unread[end:], 0
        self._begin(head)
        return True

    def _begin(self, head: Head) -> None:
        turn = self._turn = Turn(self, head)
        self._body = Chunks() if head.body_bytes is None else head.body_bytes
        if not self._body:
            turn.take(b"", is_last=True)
        task = self._loop.create_task(turn.run(self._app, self._names))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def _read_body(self) -> bool:
        """Hand on what has come of it; False while it is not over."""
        if not self._unread:
            return False
        if isinstance(self._body, Chunks):
            piece, self._unread = self._body.feed(self._unread)
            if self._body.is_over:
                self._body = 0
        else:
            piece, self._unread = self._unread[: self._body], self._unread[self._body :]
            self._body -= len(piece)
        if self._turn is None:
            # Its answer did not wait for it.
            if not self._body:
                self._head_clock.stop()
        elif not self._turn.take(piece, is_last=not self._body):
            self._pause_reading()
        return not self._body

    def _pause_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self._transport.resume_reading()

    # Bounds.

    def _watch_head(self) -> None:
        self._head_clock.start(self.headers_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        text = f"the headers did not arrive within {self.headers_timeout_s:g} s."
        self._refuse(ApiError(408, text, code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.leave()
        if turn is None or not turn.has_begun:
            body = json.dumps(error.body()).encode()
            status = http.HTTPStatus(error.status)
            # In one piece: a client that still sends may lose what comes after the first.
            self.write(
                b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%b" % (status, status.phrase.encode(), len(body), body)
            )
        self._transport.close()


def _address(name: Any) -> tuple[str, int] | None:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
