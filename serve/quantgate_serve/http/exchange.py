"""One client's exchange with the engine: submit, wait or stream, give up when the client is gone.

Runs on the event loop.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from starlette.requests import Request as HttpRequest

from quantgate_serve.admission import (
    QueueFullError,
    RequestTooLongError,
    TooManyAtOnceError,
)
from quantgate_serve.client import EngineStoppedError
from quantgate_serve.http.errors import ApiError
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


class ClientGoneError(Exception):
    """The client closed its connection before the answer was ready."""


async def complete(engine: Sharing, requests: Sequence[Request], http: HttpRequest) -> None:
    """Run `requests` to their end.

    Raises:
        ApiError: refused, or one of them failed.
        ClientGoneError: the client left; the requests were aborted.
    """
    done = asyncio.get_running_loop().create_future()
    missing = len(requests)

    def listen(delta: Delta) -> None:
        nonlocal missing
        missing -= delta.is_last
        if missing == 0 and not done.done():
            done.set_result(None)

    for request in requests:
        request.listener = listen
    submit(engine, requests)
    gone = asyncio.ensure_future(_until_disconnected(http))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientGoneError
    finally:
        gone.cancel()
        if not done.done():
            engine.abort(requests)
    for request in requests:
        if request.error is not None:
            raise api_error(request.error)


def open_stream(engine: Sharing, requests: Sequence[Request]) -> AsyncIterator[Delta]:
    """Queue `requests` now; their deltas come out of the iterator.

    Raises:
        ApiError: refused.
    """
    queue: asyncio.Queue[Delta] = asyncio.Queue()
    for request in requests:
        request.is_streaming = True
        request.listener = queue.put_nowait
    submit(engine, requests)
    return _until_last(queue, len(requests))


async def _until_last(queue: asyncio.Queue[Delta], missing: int) -> AsyncIterator[Delta]:
    while missing:
        delta = await queue.get()
        missing -= delta.is_last
        yield delta


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


async def _until_disconnected(http: HttpRequest) -> None:
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            return
