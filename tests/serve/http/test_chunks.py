"""Bodies in chunks, however their bytes are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate_serve.http.chunks import Chunks
from quantgate_serve.http.head import BadRequestError


def read(pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    """The body, what is not of it, and whether it is over."""
    chunks, body, unread = Chunks(), b"", b""
    for piece in pieces:
        unread += piece
        if not chunks.is_over:
            found, unread = chunks.feed(unread)
            body += found
    return body, unread, chunks.is_over


@given(
    parts=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    extension=st.sampled_from([b"", b";a=b", b" ;x"]),
    trailers=st.sampled_from([b"", b"x: y\r\n", b"x: y\r\nz: w\r\n"]),
    cuts=st.lists(st.integers(1, 12), max_size=60),
)
def test_the_body_is_the_same_however_its_bytes_are_cut(
    parts: list[bytes], extension: bytes, trailers: bytes, cuts: list[int]
) -> None:
    data = b"".join(b"%X%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    data += b"0\r\n" + trailers + b"\r\n"
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(data[at : at + cut])
        at += cut
    pieces.append(data[at:] + b"next")
    body, unread, is_over = read([piece for piece in pieces if piece])
    assert (body, unread, is_over) == (b"".join(parts), b"next", True)


def test_what_follows_the_end_is_left() -> None:
    assert read([b"3\r\nabc\r\n0\r\n\r\nGET /"]) == (b"abc", b"GET /", True)
    assert read([b"3\r\nab"]) == (b"ab", b"", False)
    assert read([b"3\r\nabc\r\n0\r\n"]) == (b"abc", b"", False)


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"g\r\n",
        b"-1\r\n",
        b"0x3\r\nabc\r\n",
        b" 3\r\nabc\r\n",
        b"1" * 17 + b"\r\n",
        b"3\r\nabcd\r\n",
        b"3\r\nabc0\r\n",
        b"3;\x00\r\nabc\r\n",
        b"3" * 5000,
        b"0\r\n" + b"x: y\r\n" * 101,
    ],
)
def test_what_are_no_chunks_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequestError):
        read([data])
