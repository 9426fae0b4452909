"""The short way answers what the long one would."""

import asyncio

import pytest
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from quantgate_serve.http.errors import ApiError
from quantgate_serve.http.exchange import ClientGoneError
from quantgate_serve.http.shortcut import Shortcut


async def long_way(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("long")(scope, receive, send)


async def short_way(_: HttpRequest) -> Response:
    return PlainTextResponse("short")


async def refused(_: HttpRequest) -> Response:
    raise ApiError(418, "no", code="teapot")


async def gone(_: HttpRequest) -> Response:
    raise ClientGoneError


async def faulty(_: HttpRequest) -> Response:
    raise KeyError("a secret")


async def said(method: str, path: str, sent: list[Message]) -> None:
    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nobody reads")

    answers = {"/short": short_way, "/refused": refused, "/gone": gone, "/faulty": faulty}
    scope = {"type": "http", "method": method, "path": path, "headers": []}
    await Shortcut(long_way, answers)(scope, receive, send)


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("POST", "/short", 200, b"short"),
        ("GET", "/short", 200, b"long"),
        ("POST", "/short/", 200, b"long"),
        ("POST", "/refused", 418, b'"code":"teapot"'),
    ],
)
def test_only_a_post_to_exactly_a_path_of_its_own_takes_it(
    method: str, path: str, status: int, body: bytes
) -> None:
    sent: list[Message] = []
    asyncio.run(said(method, path, sent))
    assert sent[0]["status"] == status
    assert body in sent[1]["body"]


def test_who_has_left_is_told_nothing() -> None:
    sent: list[Message] = []
    asyncio.run(said("POST", "/gone", sent))
    assert sent == []


def test_a_fault_is_a_500_in_openais_form_and_goes_on_to_the_log() -> None:
    sent: list[Message] = []
    with pytest.raises(KeyError):
        asyncio.run(said("POST", "/faulty", sent))
    assert sent[0]["status"] == 500
    assert b"internal error: KeyError" in sent[1]["body"]
    assert b"secret" not in sent[1]["body"]
