"""Heads of requests as they come, and those that two readers could read in two ways."""

import pytest

from quantgate_serve.http.head import MAX_HEAD_BYTES, BadRequestError, find_end, parse_head

GET = b"GET /health HTTP/1.1\r\nhost: a\r\n"


def test_a_head_is_method_target_and_headers() -> None:
    head = parse_head(
        b"POST /v1?a=%20 HTTP/1.1\r\nHost: a:8000\r\nX-Name:\t v w \xe9 \r\nEmpty:\r\n\r\n"
    )
    assert (head.method, head.target, head.version) == ("POST", b"/v1?a=%20", "1.1")
    assert head.headers == [(b"host", b"a:8000"), (b"x-name", b"v w \xe9"), (b"empty", b"")]
    assert (head.body_bytes, head.keeps_alive, head.expects_continue) == (0, True, False)


def test_lines_may_end_without_carriage_return() -> None:
    data = b"GET / HTTP/1.1\nhost: a\n\nrest"
    end = find_end(data, 0)
    assert end is not None
    assert data[end:] == b"rest"
    assert parse_head(data[:end]).headers == [(b"host", b"a")]


@pytest.mark.parametrize("data", [GET + b"\r\nrest", GET.replace(b"\r", b"") + b"\nrest"])
def test_the_end_is_found_however_the_bytes_are_cut(data: bytes) -> None:
    size = len(data) - len(b"rest")
    for cut in range(1, size):
        assert find_end(data[:cut], 0) is None
        assert find_end(data, cut) == size


def test_a_head_may_be_so_long_and_no_longer() -> None:
    longest = GET + b"x: " + b"a" * (MAX_HEAD_BYTES - len(GET) - 7) + b"\r\n\r\n"
    assert find_end(longest, 0) == MAX_HEAD_BYTES
    assert find_end(longest[:-1], 0) is None
    with pytest.raises(BadRequestError, match="more than 65536 bytes"):
        find_end(longest.replace(b"x", b"xx", 1), 0)
    with pytest.raises(BadRequestError, match="more than 65536 bytes"):
        find_end(longest[:-4] + b"aaaaa", 0)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (b"", (0, True)),
        (b"content-length: 7\r\n", (7, True)),
        (b"content-length: 7, 7\r\nContent-Length: 7\r\n", (7, True)),
        (b"Transfer-Encoding: Chunked\r\n", (None, True)),
        (b"connection: keep-alive, Close\r\n", (0, False)),
        (b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 3\r\n", (3, True)),
    ],
)
def test_it_says_how_long_the_body_is_and_what_follows(
    lines: bytes, expected: tuple[int | None, bool]
) -> None:
    head = parse_head(GET + lines + b"\r\n")
    assert (head.body_bytes, head.keeps_alive) == expected


def test_an_old_version_needs_no_host_and_ends_with_its_answer() -> None:
    head = parse_head(b"GET / HTTP/1.0\r\nexpect: 100-continue\r\n\r\n")
    assert (head.version, head.keeps_alive, head.expects_continue) == ("1.0", False, False)
    assert parse_head(GET.replace(b"1.1", b"1.7") + b"\r\n").version == "1.1"
    assert parse_head(GET + b"Expect: 100-Continue\r\n\r\n").expects_continue


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET  / HTTP/1.1\r\nhost: a\r\n", 400),
        (b"GET / HTTP/2.0\r\nhost: a\r\n", 400),
        (b"GET /\x7f HTTP/1.1\r\nhost: a\r\n", 400),
        (b"G(T / HTTP/1.1\r\nhost: a\r\n", 400),
        (b"GET / HTTP/1.1\r\n", 400),  # no host
        (GET + b"Host: b\r\n", 400),
        (GET + b"name\r\n", 400),
        (GET + b": value\r\n", 400),
        (GET + b"na me: value\r\n", 400),
        (GET + b"name : value\r\n", 400),
        (GET + b" folded: value\r\n", 400),
        (GET + b"x: a\r\n b\r\n", 400),
        (GET + b"x: a\x00b\r\n", 400),
        (GET + b"x: a\rb\r\n", 400),
        (GET + b"content-length: 1\r\ncontent-length: 2\r\n", 400),
        (GET + b"content-length: +1\r\n", 400),
        (GET + b"content-length: \r\n", 400),
        (GET + b"content-length: 1_0\r\n", 400),
        (GET + b"content-length: " + b"1" * 21 + b"\r\n", 400),
        (GET + b"content-length: 1\r\ntransfer-encoding: chunked\r\n", 400),
        (GET + b"transfer-encoding: gzip, chunked\r\n", 501),
        (GET + b"transfer-encoding: \r\n", 501),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(data: bytes, status: int) -> None:
    with pytest.raises(BadRequestError) as refused:
        parse_head(data + b"\r\n")
    assert refused.value.status == status


@pytest.mark.parametrize("first", [b"\x16\x03\x01", b"\r\n", b" GET"])
def test_what_cannot_become_a_head_is_refused_at_its_first_byte(first: bytes) -> None:
    with pytest.raises(BadRequestError, match="request line"):
        find_end(first, 0)
