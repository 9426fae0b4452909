"""Answers leave in one piece, however many pieces they are written in."""

import asyncio
from typing import Any


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
            self._loop.call_soon(self.flush)
        self._unsent.append(bytes(data))

    def flush(self) -> None:
        """Send what was written now: no more of it comes in this turn."""
        pieces, self._unsent = self._unsent, []
        if pieces and not self._transport.is_closing():
            self._transport.write(b"".join(pieces))

    def close(self) -> None:
        self.flush()
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
