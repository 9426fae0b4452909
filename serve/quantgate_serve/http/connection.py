"""HTTP/1.1 as uvicorn speaks it, with bounds on how slow a client may be.

A connection that sends its headers drop by drop, or never reads its answer, costs a socket and
memory for as long as it likes; uvicorn itself bounds only the pause between two requests.
"""

import asyncio
import contextlib
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from quantgate_serve.http.errors import ApiError


class JoinedWrites(asyncio.Transport):
    """A transport that sends what was written in one turn of the event loop in one piece.

    uvicorn writes an answer's head, its body and its end one by one, and each would wake who reads.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._unsent: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not data:
            return
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(bytes(data))

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._unsent.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

    def _flush(self) -> None:
        pieces, self._unsent = self._unsent, []
        if pieces and not self._transport.is_closing():
            self._transport.write(b"".join(pieces))


class Connection(H11Protocol):
    """One client's connection; `of` makes the class for given bounds."""

    # From a connection's start, or a request's first byte, to the end of its headers.
    headers_timeout_s = 20.0
    # How long what waits to be read may stay above the transport's high-water mark.
    read_timeout_s = 60.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._headers_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, *, headers_timeout_s: float, read_timeout_s: float) -> "type[Connection]":
        bounds = {"headers_timeout_s": headers_timeout_s, "read_timeout_s": read_timeout_s}
        return type(cls.__name__, (cls,), bounds)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedWrites(transport, self.loop))
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_headers_timer()
        self._cancel_read_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_headers_timer()
        elif self._headers_timer is None and not self.transport.is_closing():
            self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        # Not close(): that would wait for the client to read what it does not read.
        self._read_timer = self.loop.call_later(self.read_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_read_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when it cannot read a request as HTTP."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _watch_headers(self) -> None:
        self._headers_timer = self.loop.call_later(self.headers_timeout_s, self._headers_late)

    def _cancel_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _cancel_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _headers_late(self) -> None:
        self._headers_timer = None
        self._refuse(
            ApiError(
                408,
                f"the headers did not arrive within {self.headers_timeout_s:g} s.",
                code="request_timeout",
            )
        )

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events: tuple[h11.Event, ...] = (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        # One may be under way already; then the connection ends in the middle of it.
        with contextlib.suppress(h11.LocalProtocolError):
            # In one piece: a client that still sends may lose what comes after the first.
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()
