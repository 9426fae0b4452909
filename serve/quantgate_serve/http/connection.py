"""HTTP/1.1 as uvicorn speaks it with httptools, with bounds on what a client may do.

A connection that sends its headers drop by drop, or never reads its answer, costs a socket and
memory for as long as it likes; uvicorn itself bounds only the pause between two requests.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from quantgate_serve.http.errors import ApiError
from quantgate_serve.http.extensions import LEAVING, PIECES, WHOLE_BODY, CyclePieces, WholeBody
from quantgate_serve.http.joined_writes import JoinedWrites

# The largest heads in use (cookies, tokens) take a quarter.
MAX_HEAD_BYTES = 65_536


class Connection(HttpToolsProtocol):
    """One client's connection; `of` makes the class for given bounds."""

    # From a connection's start, a request's first byte, or the end of the answer before it, to the
    # end of its headers.
    headers_timeout_s = 20.0
    # How long what waits to be read may stay above the transport's high-water mark.
    read_timeout_s = 60.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_in_head = False
        # Of the head under way: what was understood of it, and what has come while it had no end.
        self._head_bytes = self._unended_bytes = 0
        # What was sent behind requests that are not answered yet, and is none.
        self._refusal: ApiError | None = None
        self._is_lost = False
        self._on_leave: Callable[[], object] | None = None
        # Of a head, or of the rest of a body that nobody needs.
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, *, headers_timeout_s: float, read_timeout_s: float) -> "type[Connection]":
        bounds = {"headers_timeout_s": headers_timeout_s, "read_timeout_s": read_timeout_s}
        return type(cls.__name__, (cls,), bounds)

    # asyncio's side.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._writes = JoinedWrites(transport, self.loop)
        super().connection_made(self._writes)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._stop_head_timer()
        self._stop_read_timer()
        super().connection_lost(exc)
        if self._on_leave is not None:
            self._on_leave()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._feed(data)
        if not self._is_in_head or self.transport.is_closing():
            return
        self._unended_bytes += len(data)
        if self._unended_bytes > MAX_HEAD_BYTES:
            self._refuse_input(_too_long())
        elif self._head_timer is None:
            self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        # Not close(): that would wait for the client to read what it does not read.
        self._read_timer = self.loop.call_later(self.read_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_read_timer()
        super().resume_writing()

    # The parser's side.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._head_bytes = self._unended_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        version = self.parser.get_http_version()
        hosts = sum([name == b"host" for name, _ in self.headers])
        if version not in ("1.0", "1.1"):
            raise _invalid(f"the version is to be 1.0 or 1.1, not {version}.")
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise _invalid(f"there must be one Host header, found {hosts}.")
        if self.parser.get_method() == b"CONNECT":
            raise _invalid("this server is no proxy.")
        if not _has_path(self.url):
            raise _invalid("the target is to be a path of ASCII characters.")
        if self.parser.should_upgrade():
            return  # see _feed
        extensions: dict[str, Any] = {LEAVING: self._watch}
        self.scope["extensions"] = extensions
        super().on_headers_complete()
        extensions[WHOLE_BODY] = WholeBody(self.cycle)
        if version == "1.1":
            extensions[PIECES] = CyclePieces(self.cycle)
        if self.expect_100_continue:
            # Whether the body follows an answer that did not wait for it is up to the client.
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            if self.cycle.response_complete:
                self._stop_head_timer()
            super().on_message_complete()

    # uvicorn's side.

    def on_response_complete(self) -> None:
        self._writes.flush()
        super().on_response_complete()
        if self.transport.is_closing() or self.pipeline:
            return
        if self._refusal is not None:
            self._refuse(self._refusal)
        elif self.cycle.more_body:
            # Read on and thrown away, until the next request can begin.
            self._start_head_timer(self.transport.close)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        is_old = cycle.scope["http_version"] == "1.0"
        chosen: Any = _in_one_piece(app) if is_old else app
        super()._start_asgi_task(cycle, chosen)

    # The application's side.

    def _watch(self, on_leave: Callable[[], object] | None) -> None:
        """Have `on_leave` called when the client leaves, now if it has left; None: nothing more."""
        self._on_leave = on_leave
        if on_leave is not None and self._is_lost:
            on_leave()

    # Reading.

    def _feed(self, data: bytes) -> None:
        if self._refusal is not None or self.parser is None:
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            # What follows is left to the other protocol. That is a client's offer, which Java's
            # makes with each first request; here it is passed over, and read once more without.
            head = self._head_without_offer()
            self.parser = httptools.HttpRequestParser(self)
            self._feed(head + data[offer.args[0] :])
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, ApiError):
                raise
            self._refuse_input(error.__context__)
        except httptools.HttpParserError as error:
            self._refuse_input(_invalid(f"this is not HTTP/1.1: {error}."))

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _too_long()

    def _refuse_input(self, error: ApiError) -> None:
        """What was sent is no request: nothing of this connection is read any more."""
        self._is_in_head = False
        self._stop_head_timer()
        if not self._owes_answer():
            self._refuse(error)
        elif self.pipeline and self.cycle.more_body:
            # It belongs to a request whose turn has not come: that one is never begun.
            self.pipeline.popleft()
            self._refusal = error
        elif self.cycle.more_body:
            # It belongs to the request that is read, which therefore never ends.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._refuse(error)
        else:
            self._refusal = error

    # Bounds.

    def _owes_answer(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_head(self) -> None:
        self._start_head_timer(self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._owes_answer():
            self._watch_head()
            return
        text = f"the headers did not arrive within {self.headers_timeout_s:g} s."
        self._refuse(ApiError(408, text, code="request_timeout"))

    def _start_head_timer(self, then: Callable[[], object]) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.headers_timeout_s, then)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _refuse(self, error: ApiError) -> None:
        # One may be under way already; then the connection ends in the middle of it.
        if not (self._owes_answer() and self.cycle.response_started):
            body = json.dumps(error.body()).encode()
            # In one piece: a client that still sends may lose what comes after the first.
            self.transport.write(
                b"%bcontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%b" % (STATUS_LINE[error.status], len(body), body)
            )
        self.transport.close()


def _has_path(target: bytes) -> bool:
    """Whether uvicorn can tell the path of `target`; it takes that for granted."""
    try:
        path = httptools.parse_url(target).path
    except httptools.HttpParserInvalidURLError:
        return False
    return path is not None and path.isascii()


def _in_one_piece(app: ASGIApp) -> ASGIApp:
    """For clients of HTTP/1.0, which know no chunks: an answer leaves when its length is known."""

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {}
        body = bytearray()

        async def hold(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            body.extend(message.get("body", b""))
            if message.get("more_body", False):
                return
            headers = [field for field in start["headers"] if field[0] != b"content-length"]
            length = (b"content-length", str(len(body)).encode())
            await send({**start, "headers": [*headers, length]})
            await send({"type": "http.response.body", "body": bytes(body)})

        await app(scope, receive, hold)

    return whole


def _invalid(text: str) -> ApiError:
    return ApiError(400, text, code="invalid_http")


def _too_long() -> ApiError:
    return _invalid(f"the headers have more than {MAX_HEAD_BYTES} bytes.")
