"""One client's exchange with the engine: submit, wait or stream, give up when the client is gone.

Runs on the event loop.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.requests import Request as HttpRequest
from starlette.types import Scope

from quantgate_serve.admission import (
    QueueFullError,
    RequestTooLongError,
    TooManyAtOnceError,
)
from quantgate_serve.client import EngineStoppedError
from quantgate_serve.http.errors import ApiError
from quantgate_serve.http.extensions import LEAVING
from quantgate_serve.request import Delta, Request
from quantgate_serve.sharing import Sharing

if TYPE_CHECKING:
    from quantgate_serve.request import RequestError


# Of what may end a request; 500 for the rest.
_STATUS_OF = {
    "grammar_too_complex": 400,
    "out_of_memory": 507,
    "deadline_exceeded": 504,
    "engine_failed": 503,
}


# Takes deltas, all or none of them.
Reader = Callable[[list[Delta]], bool]


class ClientGoneError(Exception):
    """The client closed its connection before the answer was ready."""


class Inbox:
    """What a client's requests have brought since it was last told, in order.

    A step that concerns several of them is told once: to `reader` if it will have it, while the
    client's task waits, or else to the task.
    """

    def __init__(self, reader: Reader | None = None) -> None:
        self._reader = reader
        self._is_offering = False
        self._error: Exception | None = None
        self._deltas: list[Delta] = []
        self._is_closed = False
        self._waiting: asyncio.Future[None] | None = None

    def put(self, delta: Delta) -> None:
        """The listener of each request."""
        self._deltas.append(delta)
        if self._reader is None:
            self._wake()
        elif not self._is_offering:
            self._is_offering = True
            asyncio.get_running_loop().call_soon(self._offer, self._reader)

    def close(self) -> None:
        """Nobody will be told: who waits for deltas is told so."""
        self._is_closed = True
        self._wake()

    async def take(self) -> list[Delta]:
        """At least one delta.

        Raises:
            ClientGoneError: the inbox was closed.
            Exception: what the reader raised.
        """
        if not self._deltas and not self._is_closed:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        if self._error is not None:
            raise self._error
        if self._is_closed:
            raise ClientGoneError
        deltas, self._deltas = self._deltas, []
        return deltas

    def _offer(self, reader: Reader) -> None:
        self._is_offering = False
        if self._waiting is not None and not self._is_closed:
            try:
                if reader(self._deltas):
                    self._deltas = []
                    return
            except Exception as error:  # the task's to raise
                self._error = error
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


async def complete(engine: Sharing, requests: Sequence[Request], http: HttpRequest) -> None:
    """Run `requests` to their end.

    Raises:
        ApiError: refused, or one of them failed.
        ClientGoneError: the client left; the requests were aborted.
    """
    inbox, missing = Inbox(), len(requests)
    for request in requests:
        request.listener = inbox.put
    submit(engine, requests)
    try:
        with closing_with(http.scope, inbox):
            while missing:
                missing -= sum(delta.is_last for delta in await inbox.take())
    finally:
        if missing:
            engine.abort(requests)
    for request in requests:
        if request.error is not None:
            raise api_error(request.error)


def open_stream(engine: Sharing, requests: Sequence[Request], reader: Reader) -> Inbox:
    """Queue `requests` now; their deltas come into the inbox, which offers them to `reader` first.

    Raises:
        ApiError: refused.
    """
    inbox = Inbox(reader)
    for request in requests:
        request.is_streaming = True
        request.listener = inbox.put
    submit(engine, requests)
    return inbox


@contextmanager
def closing_with(scope: Scope, inbox: Inbox) -> Iterator[None]:
    """While the block runs, close `inbox` when the client has closed its connection."""
    watch = scope["extensions"][LEAVING]
    watch(inbox.close)
    try:
        yield
    finally:
        watch(None)


def submit(engine: Sharing, requests: Sequence[Request]) -> None:
    """Queue `requests` or say in HTTP terms why not."""
    try:
        engine.submit(requests)
    except RequestTooLongError as error:
        raise ApiError(400, str(error), code="context_length_exceeded") from error
    except TooManyAtOnceError as error:
        raise ApiError(400, str(error), code="too_many_at_once") from error
    except EngineStoppedError as error:
        raise ApiError(503, str(error), code="engine_failed", retry_after_s=1) from error
    except QueueFullError as error:
        raise ApiError(
            429, str(error), code=error.reason, retry_after_s=error.retry_after_s
        ) from error


def api_error(error: "RequestError") -> ApiError:
    return ApiError(_STATUS_OF.get(error.code, 500), error.message, code=error.code)
