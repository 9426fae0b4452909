"""The shortest way for what is asked most: a POST to a path that has an answer of its own.

The router compares a path with one route after another, and each request passes layers that only
others need. All that is not a POST to exactly one of these paths goes on to them.
"""

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quantgate_serve.http.errors import ApiError, unexpected
from quantgate_serve.http.exchange import ClientGoneError

Answer = Callable[[HttpRequest], Awaitable[Response]]


class Shortcut:
    """ASGI middleware around all others. Errors have the form that the routes would give them."""

    def __init__(self, app: ASGIApp, answers: Mapping[str, Answer]) -> None:
        self._app = app
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = None
        if scope["type"] == "http" and scope["method"] == "POST":
            answer = self._answers.get(scope["path"])
        if answer is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await answer(HttpRequest(scope, receive))
        except ApiError as error:
            response = error.response()
        except ClientGoneError:
            return
        except Exception as error:
            await unexpected(error).response()(scope, receive, send)
            raise  # uvicorn logs it
        await response(scope, receive, send)
