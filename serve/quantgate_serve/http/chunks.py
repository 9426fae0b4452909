"""A request's body in chunks, out of its bytes as they arrive (RFC 9112, section 7.1)."""

import re

from quantgate_serve.http.head import BadRequestError

# A chunk's length with its extension, or a trailer. Both are read and not looked at.
_MAX_LINE_BYTES = 4096
_MAX_TRAILER_LINES = 100
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")


class Chunks:
    """Takes what has arrived, and gives what of it is body."""

    def __init__(self) -> None:
        self.is_over = False
        # Of the chunk that is being read.
        self._left = 0
        # Its end of line is still to come.
        self._is_closing = False
        self._num_trailers: int | None = None

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """The body in `data`, and what cannot be read yet or is not of this body.

        Raises:
            BadRequestError: these are no chunks.
        """
        body: list[bytes] = []
        at = 0
        while at < len(data):
            if self._left:
                piece = data[at : at + self._left]
                body.append(piece)
                self._left -= len(piece)
                self._is_closing = not self._left
                at += len(piece)
                continue
            end = data.find(b"\r\n", at, at + _MAX_LINE_BYTES)
            if end < 0:
                if len(data) - at >= _MAX_LINE_BYTES:
                    raise BadRequestError("a line between two chunks is too long.")
                break
            line, at = data[at:end], end + 2
            if self._take_line(line):
                self.is_over = True
                break
        return b"".join(body), data[at:]

    def _take_line(self, line: bytes) -> bool:
        """True if it is the last of the body."""
        if self._is_closing:
            if line:
                raise BadRequestError("a chunk is longer than its length.")
            self._is_closing = False
        elif self._num_trailers is not None:
            self._num_trailers += 1
            if self._num_trailers > _MAX_TRAILER_LINES:
                raise BadRequestError("there are too many lines behind the body.")
            return not line
        else:
            size = _SIZE.fullmatch(line)
            if size is None:
                raise BadRequestError("the length of a chunk was expected.")
            self._left = int(size[1], 16)
            if not self._left:
                self._num_trailers = 0
        return False
