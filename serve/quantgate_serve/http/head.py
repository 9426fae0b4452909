"""The head of an HTTP/1.1 request out of its bytes, after RFC 9112.

Strict where two readers of one connection could disagree about where a request ends. What a request
says about its connection and its body is read here, once; the rest of its fields is passed on.
"""

import re
from dataclasses import dataclass

# As h11 has it; the largest heads in use (cookies, tokens) take a quarter.
MAX_HEAD_BYTES = 65_536
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/1\.([0-9])" % _TOKEN)
_FIELD = re.compile(rb"(%b):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)" % _TOKEN)
# Lines may end without the carriage return; an empty one ends the head.
_END = re.compile(rb"\n\r?\n")
# What the reading of a head looks at.
_FRAMING = frozenset((b"host", b"content-length", b"transfer-encoding", b"connection", b"expect"))


class BadRequestError(Exception):
    """What came cannot be read as HTTP/1.1, or asks for what this server cannot do (501)."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Head:
    """A request but for its body."""

    method: str
    target: bytes
    # Names in lower case.
    headers: list[tuple[bytes, bytes]]
    # "1.1" also for later minor versions: they may be answered as that.
    version: str
    # Bytes of the body; None where it comes in chunks.
    body_bytes: int | None
    keeps_alive: bool
    expects_continue: bool


def find_end(data: bytes, searched: int) -> int | None:
    """Where the body begins; None while the head goes on. The first `searched` bytes are known.

    Raises:
        BadRequestError: this is no head, or one that is too long.
    """
    if data[0] < 0x21:
        raise BadRequestError("a request line was expected.")
    # The end may have begun in what is known.
    found = _END.search(data, max(0, searched - 2))
    if (len(data) if found is None else found.end()) > MAX_HEAD_BYTES:
        raise BadRequestError(f"the headers have more than {MAX_HEAD_BYTES} bytes.")
    return None if found is None else found.end()


def parse_head(data: bytes) -> Head:
    """The head that `data`, up to its end, holds.

    Raises:
        BadRequestError: a line is not as it must be, or two contradict each other.
    """
    first, *lines = data.replace(b"\r\n", b"\n").rstrip(b"\n").split(b"\n")
    request_line = _REQUEST_LINE.fullmatch(first)
    if request_line is None:
        raise BadRequestError("the request line is not METHOD TARGET HTTP/1.1.")
    method, target, minor = request_line.groups()
    headers: list[tuple[bytes, bytes]] = []
    framing: dict[bytes, list[bytes]] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise BadRequestError("a header is not NAME: VALUE on one line.")
        name, value = field[1].lower(), field[2].rstrip(b" \t")
        headers.append((name, value))
        if name in _FRAMING:
            framing.setdefault(name, []).append(value)
    version = "1.0" if minor == b"0" else "1.1"
    hosts = len(framing.get(b"host", ()))
    if hosts > 1 or (not hosts and version == "1.1"):
        raise BadRequestError(f"there must be one Host header, found {hosts}.")
    tokens = _tokens(framing.get(b"connection"))
    return Head(
        method.decode("ascii"),
        target,
        headers,
        version,
        _body_bytes(framing),
        keeps_alive=version == "1.1" and b"close" not in tokens,
        expects_continue=version == "1.1" and b"100-continue" in _tokens(framing.get(b"expect")),
    )


def _body_bytes(framing: dict[bytes, list[bytes]]) -> int | None:
    encodings = _tokens(framing.get(b"transfer-encoding"))
    lengths = set(_tokens(framing.get(b"content-length")))
    if encodings:
        if encodings != [b"chunked"]:
            raise BadRequestError("the only transfer encoding here is chunked.", status=501)
        if lengths:
            raise BadRequestError("a body in chunks has no Content-Length.")
        return None
    if not lengths:
        return 0
    if len(lengths) > 1:
        raise BadRequestError("two Content-Length headers contradict each other.")
    (length,) = lengths
    if not length.isdigit() or len(length) > 20:
        raise BadRequestError("Content-Length is not a number of bytes.")
    return int(length)


def _tokens(values: list[bytes] | None) -> list[bytes]:
    """The elements of a list header, in lower case; an empty header has an empty one."""
    if values is None:
        return []
    return [token.strip(b" \t").lower() for value in values for token in value.split(b",")]
