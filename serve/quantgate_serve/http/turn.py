"""One request and its answer on a connection: ASGI on one side, bytes on the other."""

import asyncio
import http
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Scope

from quantgate_serve.http.head import Head

_log = logging.getLogger(__name__)
# Of a body that nobody has asked for yet; beyond, the connection is not read.
BODY_HIGH_WATER = 65_536
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
    for status in http.HTTPStatus
}
_NO_BODY = frozenset((204, 304))
# The ASGI extension by which the application names what is to be called when its client leaves: a
# task that waits for the disconnect costs more than the rest of a short answer's bookkeeping.
LEAVING = "quantgate.leaving"
# The one by which it writes pieces of a stream without a task's turn: see `Pieces`.
PIECES = "quantgate.pieces"


class Wire(Protocol):
    """What a turn needs of its connection."""

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Written in front of those of each answer."""

    def write(self, data: bytes) -> None: ...
    @property
    def is_writable(self) -> bool:
        """False while too much waits to be read."""

    async def writable(self) -> None:
        """Wait until it is writable."""

    def wants_body(self) -> None:
        """There is room for more of the body."""

    def answered(self, *, keeps_alive: bool) -> None:
        """The answer has been written, whole."""

    def break_off(self) -> None:
        """The answer cannot be completed."""


class Pieces(Protocol):
    """The middle of an answer's body, once it has begun."""

    @property
    def is_writable(self) -> bool:
        """False while the client has to read first: then pieces are sent, which waits for it."""

    def put(self, body: bytes) -> None:
        """Write some of the body."""


class Turn:
    """Runs the application for one request, and writes what it answers.

    An answer's head leaves with the first piece of its body, or by itself in the event loop's next
    turn: each write would wake who reads.
    """

    def __init__(self, wire: Wire, head: Head) -> None:
        self.keeps_alive = head.keeps_alive
        # Its client has left: what is still written goes nowhere.
        self.is_gone = False
        self.has_begun = False
        self.is_answered = False
        self._wire = wire
        self._head = head
        self._expects_continue = head.expects_continue
        self._body = bytearray()
        self._more_body = True
        # Something has come since the application last looked.
        self._has_news = False
        self._waiting: asyncio.Future[None] | None = None
        self._on_leave: Callable[[], object] | None = None
        # Of the answer.
        self._unsent_head = b""
        self._is_chunked = False
        self._has_no_body = False
        self._left: int | None = None

    def scope(self, connection: Mapping[str, Any]) -> Scope:
        """What the application is told, with what `connection` has to say."""
        head = self._head
        path, _, query = head.target.partition(b"?")
        text = path.decode("ascii")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "method": head.method,
            "root_path": "",
            "path": unquote(text) if "%" in text else text,
            "raw_path": path,
            "query_string": query,
            "headers": head.headers,
            "extensions": {LEAVING: self._watch, PIECES: self},
            **connection,
        }

    # From the connection.

    def take(self, body: bytes, *, is_last: bool) -> bool:
        """More of the body; False if the connection should not be read for now."""
        self._body += body
        self._more_body = not is_last
        self._wake()
        return len(self._body) <= BODY_HIGH_WATER

    def leave(self) -> None:
        """The client has closed its connection."""
        self.is_gone = True
        self._wake()
        if self._on_leave is not None:
            self._on_leave()

    async def run(self, app: ASGIApp, connection: Mapping[str, Any]) -> None:
        """The whole turn. A fault of the application is a 500, or breaks the answer off."""
        try:
            await app(self.scope(connection), self._receive, self._send)
        except BaseException as error:
            _log.error("a request failed", exc_info=error)
            await self._fail()
        else:
            if not (self.is_answered or self.is_gone):
                _log.error("a request was left without its answer")
                await self._fail()

    # The application's side.

    def _watch(self, on_leave: Callable[[], object] | None) -> None:
        """Have `on_leave` called when the client leaves, now if it has left; None: nothing more."""
        self._on_leave = on_leave
        if on_leave is not None and self.is_gone:
            on_leave()

    @property
    def is_writable(self) -> bool:
        return self.has_begun and not self.is_answered and self._wire.is_writable

    def put(self, body: bytes) -> None:
        if not self.is_gone:
            self._write(body, is_last=False)

    async def _receive(self) -> Message:
        if not (self.is_gone or self.is_answered):
            if self._expects_continue:
                self._expects_continue = False
                self._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._wire.wants_body()
            if not self._has_news:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting
            self._has_news = False
        if self.is_gone or self.is_answered:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self._more_body}

    async def _send(self, message: Message) -> None:
        if not (self.is_gone or self._wire.is_writable):
            await self._wire.writable()
        if self.is_gone:
            return
        if message["type"] == "http.response.start" and not self.has_begun:
            self._begin(message["status"], message.get("headers", ()))
        elif message["type"] == "http.response.body" and self.has_begun and not self.is_answered:
            self._write(message.get("body", b""), is_last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"{message['type']} is not what comes next in an answer")

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.has_begun = True
        if self._expects_continue and self._more_body:
            # Whether the body follows all the same is up to the client.
            self.keeps_alive = self._expects_continue = False
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        says_close = False
        for name, value in (*self._wire.default_headers, *headers):
            lines.append(b"%b: %b\r\n" % (name, value))
            if name == b"content-length":
                self._left = int(value)
            elif name == b"connection" and value.lower() == b"close":
                says_close = True
        self._has_no_body = self._head.method == "HEAD" or status in _NO_BODY
        if not self._has_no_body and self._left is None:
            # Otherwise the end of the connection is the end of the body.
            self._is_chunked = self._head.version == "1.1"
            if self._is_chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keeps_alive = False
        self.keeps_alive = self.keeps_alive and not says_close
        if not (self.keeps_alive or says_close):
            lines.append(b"connection: close\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines):
            raise RuntimeError("a header of the answer has more than one line")
        self._unsent_head = head + b"\r\n"
        asyncio.get_running_loop().call_soon(self._send_head)

    def _send_head(self) -> None:
        head, self._unsent_head = self._unsent_head, b""
        if head and not self.is_gone:
            self._wire.write(head)

    def _write(self, body: bytes, *, is_last: bool) -> None:
        head, self._unsent_head = self._unsent_head, b""
        if self._is_chunked:
            piece = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            self._wire.write(b"%b%b0\r\n\r\n" % (head, piece) if is_last else head + piece)
        elif self._has_no_body:
            self._wire.write(head)
        else:
            if self._left is not None:
                self._left -= len(body)
                if self._left < 0 or (is_last and self._left):
                    raise RuntimeError("the answer's body is not as long as it says")
            self._wire.write(head + body)
        if is_last:
            self.is_answered = True
            self._wake()
            self._wire.answered(keeps_alive=self.keeps_alive)

    async def _fail(self) -> None:
        if self.is_gone or self.is_answered:
            return
        if self.has_begun:
            self._wire.break_off()
            return
        text = b"Internal Server Error"
        self._begin(
            500,
            [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"content-length", b"%d" % len(text)),
                (b"connection", b"close"),
            ],
        )
        self._write(text, is_last=True)

    def _wake(self) -> None:
        self._has_news = True
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
