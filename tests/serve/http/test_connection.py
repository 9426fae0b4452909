"""Slow, odd and vanishing clients: each is answered or cut off, and the others are served."""

import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress

import httpx
import pytest

Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="module")
def url(serve: Serve) -> Iterator[str]:
    timeouts = ("--headers-timeout-s", "0.5", "--body-timeout-s", "0.5", "--read-timeout-s", "1")
    with serve(*timeouts, "--max-body-bytes", "20000") as found:
        yield found


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    found = bytearray()
    with suppress(ConnectionResetError):  # what we sent was not read to its end
        while part := connection.recv(65536):
            found += part
    return bytes(found)


def error_of(raw: bytes) -> tuple[int, str]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"]
)
def test_headers_that_do_not_come_are_a_408(url: str, sent: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(sent)
        assert error_of(read_all(connection)) == (408, "request_timeout")


def test_headers_that_trickle_are_cut_off_too(url: str) -> None:
    with connect(url) as connection:
        started = time.monotonic()
        connection.settimeout(0.05)
        found = b""
        connection.sendall(b"GET /")
        while not found and time.monotonic() < started + 4:
            connection.sendall(b"a")
            with suppress(TimeoutError):
                found = connection.recv(65536)
        assert error_of(found) == (408, "request_timeout")


def test_a_second_request_has_the_same_bound(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(0.8)  # the pause between two requests is no slow request
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert error_of(read_all(connection)) == (408, "request_timeout")


def test_an_upgrade_that_is_not_offered_is_passed_over(url: str) -> None:
    # Java's HttpClient offers h2c with each first request; httptools by itself would drop the body.
    body = b'{"prompt": [3, 4], "max_tokens": 1}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: upgrade, close\r\n"
        f"upgrade: h2c\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with connect(url) as connection:
        connection.sendall(head.encode() + body)
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_an_answer_s_head_and_body_arrive_together(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        assert connection.recv(65536).endswith(b"\r\n\r\nok")


def test_a_body_that_does_not_come_is_a_408(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{"
        )
        assert error_of(read_all(connection)) == (408, "request_timeout")


def test_what_is_not_http_is_a_400_in_the_same_form(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n")
        assert error_of(read_all(connection)) == (400, "invalid_http")


def test_headers_without_end_are_refused(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000)
        assert error_of(read_all(connection)) == (400, "invalid_http")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_a_413_however_it_is_announced(url: str, chunked: bool) -> None:
    body = b'{"prompt": "' + b"a" * 30_000 + b'"}'
    content = iter([body[:15_000], body[15_000:]]) if chunked else body
    answer = httpx.post(f"{url}/v1/completions", content=content)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_a_client_that_does_not_read_is_cut_off(url: str) -> None:
    body = json.dumps(
        {
            "prompt": [[3] * 8] * 64,
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 20,
        }
    ).encode()
    with connect(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        deadline = time.monotonic() + 30
        while running(url) == 0:
            assert time.monotonic() < deadline, "the request was not begun"
            time.sleep(0.02)
        while running(url) > 0:
            assert time.monotonic() < deadline, "the request of a deaf client goes on"
            time.sleep(0.1)
        # A fast engine may have made all tokens by now; what counts is that nobody holds them.
        time.sleep(2.5)  # --read-timeout-s is 1
        # What the kernel holds still comes; through a narrow window that would take minutes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        assert b"[DONE]" not in read_all(connection)


def running(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(
        float(line.split()[-1]) for line in lines if line.startswith("quantgate_num_requests_run")
    )


@pytest.fixture
def allow_files() -> Iterator[Callable[[int], None]]:
    """Sets how many files this process, and those that it starts from then on, may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(count: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))

    yield allow
    allow(soft)


def test_more_idle_connections_than_the_usual_limit_of_files_stop_nobody(
    serve: Serve, allow_files: Callable[[int], None]
) -> None:
    allow_files(1024)
    with serve("--headers-timeout-s", "60") as url, ExitStack() as idle:
        allow_files(2048)
        for _ in range(1200):
            idle.enter_context(connect(url))
        asked = {"prompt": [5, 6], "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=asked, timeout=10).status_code == 200


def test_a_request_s_id_comes_back_and_a_strange_one_is_replaced(url: str) -> None:
    def id_of(given: str | None, path: str = "/health") -> str:
        headers = {} if given is None else {"x-request-id": given}
        return httpx.get(f"{url}{path}", headers=headers).headers["x-request-id"]

    assert id_of("job-7:a") == "job-7:a"
    assert id_of("job-8", "/v1/nothing") == "job-8"
    assert len({id_of(None), id_of(None), id_of("a b"), id_of("x" * 129)}) == 4
