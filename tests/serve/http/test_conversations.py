"""Requests and answers on one connection, by a small application in this process."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.server import ServerState

from quantgate_serve.http.connection import Connection
from quantgate_serve.http.extensions import LEAVING, PIECES, WHOLE_BODY, Pieces

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
talking: list[Connection] = []
LENGTH = [(b"content-length", b"2")]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """The path and the body, in pieces of which the client is told no length."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send(piece(scope["path"].encode(), more=True))
    await send(piece(body))


def piece(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def talk(app: Any, conversation: Talk, **bounds: float) -> None:
    """One conversation with a server of `app`, which finds its connection in the scope."""

    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "connection": talking[-1]}, receive, send)

    async def run() -> None:
        config = Config(told, timeout_keep_alive=30, lifespan="off", log_config=None)
        config.load()
        kind = Connection.of(**{"headers_timeout_s": 20.0, "read_timeout_s": 20.0, **bounds})

        def make() -> Connection:
            talking.append(kind(config, state, {}))
            return talking[-1]

        state = ServerState()
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            await asyncio.wait_for(conversation(reader, writer), 10)
        finally:
            writer.close()
            server.close()
            while state.connections or state.tasks:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def request(path: str, *, body: bytes = b"", lines: str = "", method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n{lines}\r\n"
    return head.encode() + body


async def read_chunked(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of an answer in chunks."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"transfer-encoding: chunked\r\n" in head
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    assert await reader.readline() == b"\r\n"
    return head, body


def test_requests_sent_at_once_are_answered_in_order() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(request(f"/{i}", body=b"b" * i) for i in range(200)))
        for i in range(200):
            _, body = await read_chunked(reader)
            assert body == f"/{i}".encode() + b"b" * i

    talk(echo, conversation)


def test_more_than_a_buffer_sent_ahead_waits_and_is_answered() -> None:
    running = [0, 0]

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0)
        await echo(scope, receive, send)
        running[0] -= 1

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = b"x" * 40_000
        writer.write(request("/", body=body) * 40)
        for _ in range(40):
            assert (await read_chunked(reader))[1] == b"/" + body

    talk(slow, conversation)
    assert running[1] == 1


def test_a_request_that_comes_byte_by_byte_is_the_same() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = b"POST /a%20b?c HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        for byte in lines + b"3\r\nabc\r\n0\r\n\r\n":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await read_chunked(reader))[1] == b"/a babc"

    talk(echo, conversation)


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = request("/", body=b"abc", lines="expect: 100-continue\r\n")
        writer.write(whole[:-3])
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(whole[-3:])
        assert (await read_chunked(reader))[1] == b"/abc"

    talk(echo, conversation)


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """An answer that does not wait for the body."""
    await send({"type": "http.response.start", "status": 200, "headers": LENGTH})
    await send(piece(b"no"))


def test_a_body_that_nobody_needs_is_passed_over() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            whole = request("/", body=b"x" * 300_000)
            writer.write(whole[:200_000])
            head = await reader.readuntil(b"\r\n\r\nno")
            assert b"connection: close" not in head
            writer.write(whole[200_000:])

    talk(refuse, conversation)


def test_a_body_that_nobody_needs_must_come_in_time() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/", body=b"x" * 10)[:-1])
        assert (await reader.read()).endswith(b"no")

    talk(refuse, conversation, headers_timeout_s=0.1)


def test_who_did_not_get_leave_to_send_its_body_is_cut_off() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/", body=b"abc", lines="expect: 100-continue\r\n")[:-3])
        assert b"connection: close\r\n" in await reader.read()

    talk(refuse, conversation)


@pytest.mark.parametrize(
    ("sent", "closes"),
    [
        (request("/"), False),
        (request("/", lines="connection: close\r\n"), True),
        (b"POST / HTTP/1.0\r\n\r\n", True),
    ],
)
def test_a_connection_ends_when_its_client_says_so(sent: bytes, closes: bool) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        head = await reader.readuntil(b"\r\n\r\nno")
        assert (b"connection: close\r\n" in head) == closes
        if closes:
            assert await reader.read() == b""
        else:
            writer.write(sent)
            await reader.readuntil(b"\r\n\r\nno")

    talk(refuse, conversation)


def test_an_old_client_s_answer_ends_with_the_connection() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST /a HTTP/1.0\r\ncontent-length: 1\r\n\r\nb")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert body == b"/ab"

    talk(echo, conversation)


@pytest.mark.parametrize(
    "lines",
    [
        b"",  # no host
        b"host: a\r\nhost: b\r\n",
        b"host: a\r\nname\r\n",
        b"host: a\r\n: value\r\n",
        b"host: a\r\nna me: value\r\n",
        b"host : a\r\n",
        b"host: a\r\n folded: value\r\n",
        b"host: a\r\nx: a\x00b\r\n",
        b"host: a\r\nx: a\rb\r\n",
        b"host: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n",
        b"host: a\r\ncontent-length: +1\r\n",
        b"host: a\r\ncontent-length: 1_0\r\n",
        b"host: a\r\ncontent-length: 99999999999999999999\r\n",
        b"host: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n",
        b"host: a\r\ntransfer-encoding: gzip\r\n",
        b"host: a\r\n" + b"x: " + b"a" * 65_536 + b"\r\n",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(lines: bytes) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST / HTTP/1.1\r\n" + lines + b"\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'"code": "invalid_http"' in answer

    talk(echo, conversation)


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/2.0",
        b"CONNECT a:80 HTTP/1.1",
        b"GET http://a HTTP/1.1",
        b"GET /\xff HTTP/1.1",
    ],
)
def test_what_is_asked_otherwise_is_refused(line: bytes) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(line + b"\r\nhost: a\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")

    talk(echo, conversation)


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_an_upgrade_that_is_offered_is_passed_over_however_it_is_cut(cut: int) -> None:
    lines = "connection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: A\r\n"

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = request("/a", body=b"abc", lines=lines) + request("/b", body=b"d")
        writer.write(whole[:cut])
        await asyncio.sleep(0.01)
        writer.write(whole[cut:])
        assert (await read_chunked(reader))[1] == b"/aabc"
        assert (await read_chunked(reader))[1] == b"/bd"

    talk(echo, conversation)


def test_the_answer_to_head_is_the_head() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/", method="HEAD", lines="connection: close\r\n"))
        answer = await reader.read()
        assert b"content-length: 2\r\n" in answer
        assert answer.endswith(b"\r\n\r\n")

    talk(refuse, conversation)


def test_a_head_sent_behind_a_running_request_has_its_bound_after_the_answer() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.4)  # longer than the headers' bound
        await refuse(scope, receive, send)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/") + b"GET / HT")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\nno")
        assert b"408 Request Timeout" in await reader.read()

    talk(slow, conversation, headers_timeout_s=0.2)


def test_what_is_no_request_behind_one_is_refused_after_its_answer() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/") + b"\x00\r\n\r\n")
        answer = await reader.read()
        assert answer.index(b"200 OK") < answer.index(b"400 Bad Request")

    talk(refuse, conversation)


def test_broken_chunks_end_the_request_that_they_belong_to() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"x\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    talk(read, conversation)


def test_broken_chunks_of_a_request_behind_one_wait_for_its_answer() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["path"] == "/first"
        await send({"type": "http.response.start", "status": 200, "headers": LENGTH})
        await asyncio.sleep(0.2)
        await send(piece(b"no"))

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"POST /second HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(request("/first") + head + b"x\r\n")
        answer = await reader.read()
        assert answer.index(b"200 OK") < answer.index(b"\r\n\r\nno") < answer.index(b"400 Bad")

    talk(slow, conversation)


def test_pieces_are_written_at_once_until_the_client_must_read() -> None:
    counts: list[int] = []
    full = asyncio.Event()

    async def pour(scope: Scope, receive: Receive, send: Send) -> None:
        pieces: Pieces = scope["extensions"][PIECES]
        assert not pieces.is_writable
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while pieces.is_writable:
            pieces.put(b"x" * 65_536)
            counts.append(65_536)
            await asyncio.sleep(0)  # what was put leaves in the event loop's next turn
        with pytest.raises(RuntimeError, match="nothing can be written"):
            pieces.put(b"y")
        full.set()
        await send(piece(b"end"))
        assert not pieces.is_writable

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/"))
        await full.wait()
        assert (await read_chunked(reader))[1] == b"x" * sum(counts) + b"end"

    talk(pour, conversation)
    assert counts


def test_a_body_is_taken_whole_once_all_of_it_has_come() -> None:
    found: list[bytes | None] = []

    async def take(scope: Scope, receive: Receive, send: Send) -> None:
        whole: Callable[[], bytes | None] = scope["extensions"][WHOLE_BODY]
        found.append(whole())
        while found[-1] is None:
            await asyncio.sleep(0.01)
            found.append(whole())
        found.append(whole())  # it has been taken
        await send({"type": "http.response.start", "status": 200, "headers": LENGTH})
        await send(piece(b"ok"))

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n"
        writer.write(head + b"body")
        await reader.readuntil(b"\r\n\r\nok")
        assert found == [b"body", None]
        found.clear()
        writer.write(head + b"bo")
        await asyncio.sleep(0.1)
        assert set(found) == {None}
        writer.write(b"dy")
        await reader.readuntil(b"\r\n\r\nok")
        assert found[-2:] == [b"body", None]

    talk(take, conversation)


def test_who_waits_to_be_asked_for_a_body_is_asked() -> None:
    async def take(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["extensions"][WHOLE_BODY]() is None
        await echo(scope, receive, send)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"POST /a HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert (await read_chunked(reader))[1] == b"/ahi"

    talk(take, conversation)


def test_a_large_body_that_was_taken_whole_leaves_the_client_watched() -> None:
    """uvicorn stops reading above 64 KiB, and who is not read is not seen to leave."""
    left, before = asyncio.Event(), len(talking)

    async def take(scope: Scope, receive: Receive, send: Send) -> None:
        assert len(scope["extensions"][WHOLE_BODY]()) == 100_000
        scope["extensions"][LEAVING](left.set)
        await asyncio.wait_for(left.wait(), 5)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n"
        while len(talking) == before:
            await asyncio.sleep(0.01)
        talking[-1].data_received(head + b"x" * 100_000)  # in one piece, as it may come
        await asyncio.sleep(0.1)

    talk(take, conversation)
    assert left.is_set()


@pytest.mark.parametrize("leaves", ["before", "while"])
def test_who_leaves_is_noticed(leaves: str) -> None:
    told: list[str] = []

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        left = asyncio.Event()
        if leaves == "before":
            await asyncio.sleep(0.1)
        scope["extensions"][LEAVING](left.set)
        await left.wait()
        told.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})  # to nobody
        await send(piece(b""))

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/"))
        await asyncio.sleep(0.05)

    talk(wait, conversation)
    assert told == ["http.disconnect"]


def test_a_fault_is_a_500_or_breaks_the_answer_off(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send(piece(b"begun", more=True))
        if scope["path"] == "/split":
            value = b"a\r\nb: c"
            await send({"type": "http.response.start", "status": 200, "headers": [(b"a", value)]})
        if scope["path"] == "/longer":
            await send({"type": "http.response.start", "status": 200, "headers": LENGTH})
            await send(piece(b"more"))
        if scope["path"] != "/nothing":
            raise ValueError("a fault")

    answers: dict[str, bytes] = {}

    def ask(path: str) -> Talk:
        async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(request(path))
            answers[path] = await reader.read()

        return conversation

    with caplog.at_level(logging.CRITICAL):
        for path in ("/early", "/late", "/split", "/longer", "/nothing"):
            talk(fail, ask(path))
    assert answers["/early"].startswith(b"HTTP/1.1 500 ")
    assert answers["/nothing"].startswith(b"HTTP/1.1 500 ")
    assert answers["/late"].endswith(b"5\r\nbegun\r\n")
    assert b"b: c" not in answers["/split"]
    assert not answers["/longer"].endswith(b"more")


def test_a_stop_lets_the_answer_under_way_finish() -> None:
    async def stop(scope: Scope, receive: Receive, send: Send) -> None:
        scope["connection"].shutdown()
        await refuse(scope, receive, send)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/"))
        answer = await reader.read()
        assert b"connection: close\r\n" in answer
        assert answer.endswith(b"no")

    talk(stop, conversation)


def test_a_stop_closes_a_connection_that_owes_nothing() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/"))
        await reader.readuntil(b"no")
        talking[-1].shutdown()
        assert await reader.read() == b""

    talk(refuse, conversation)
