"""What this server's connections give the application beyond ASGI, by the names of extensions.

They save a short answer what costs more than the rest of it: a task that waits for the client to
leave, messages for a body that has come with its head, a task's turn for each piece of a stream.
"""

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# The ASGI extension by which the application names what is to be called when its client leaves: a
# task that waits for the disconnect costs more than the rest of a short answer's bookkeeping.
LEAVING = "quantgate.leaving"
# The one by which it writes pieces of a stream without a task's turn: see `Pieces`.
PIECES = "quantgate.pieces"
# The one by which it asks for a body without waiting: the body if all of it has come, else None.
# Most have come with their head, and need neither a timer nor messages.
WHOLE_BODY = "quantgate.whole_body"
Result = TypeVar("Result")


class Pieces(Protocol):
    """The middle of an answer's body, once it has begun."""

    @property
    def is_writable(self) -> bool:
        """False while the client has to read first: then pieces are sent, which waits for it."""

    def put(self, body: bytes) -> None:
        """Write some of the body."""


class CyclePieces:
    """Pieces of the answer of one of uvicorn's cycles."""

    def __init__(self, cycle: "RequestResponseCycle") -> None:
        self._cycle = cycle

    @property
    def is_writable(self) -> bool:
        cycle = self._cycle
        return cycle.response_started and not (cycle.response_complete or cycle.flow.write_paused)

    def put(self, body: bytes) -> None:
        # It waits for nothing but for what is_writable tells.
        _at_once(
            self._cycle.send({"type": "http.response.body", "body": body, "more_body": True}),
            otherwise="a piece was put where nothing can be written",
        )


class WholeBody:
    """The body of one of uvicorn's cycles, once all of it has come."""

    def __init__(self, cycle: "RequestResponseCycle") -> None:
        self._cycle = cycle

    def __call__(self) -> bytes | None:
        """Take the body; None while some of it is missing, and once it has been taken."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected or not cycle.message_event.is_set():
            return None
        message: Any = _at_once(cycle.receive(), otherwise="the body is not there")
        body: bytes = message["body"]
        return body


def _at_once(work: Coroutine[Any, Any, Result], *, otherwise: str) -> Result:
    """The result of `work`, which has nothing to wait for.

    Raises:
        RuntimeError: `otherwise`, it has.
    """
    try:
        work.send(None)
    except StopIteration as done:
        result: Result = done.value
        return result
    work.close()
    raise RuntimeError(otherwise)
