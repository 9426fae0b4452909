"""Tokens to text while they arrive, and stop strings across token boundaries."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# Tokens that may wait for their text. A character has four bytes at most, and each token is decoded
# with all that wait: a model that goes on with end tokens or broken bytes would take longer for
# each, and hold up everybody's text.
_MAX_PENDING = 16
Decode = Callable[[list[int]], str]


class TextStream:
    """Grows a text token by token, holding back what may still change or become a stop string.

    The text before a stop string is kept, the stop string itself is not.
    """

    def __init__(self, decode: Decode, *, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._longest_stop = max((len(text) for text in self._stop), default=0)
        self._ids: list[int] = []
        # Decoding starts at _prefix, before _read: a token decoded alone may lose its space.
        self._prefix = 0
        self._read = 0
        self._text = ""
        self._num_emitted = 0
        self.stop_reason: str | None = None
        """The stop string that ended the text."""

    @property
    def is_stopped(self) -> bool:
        return self.stop_reason is not None

    @property
    def text(self) -> str:
        return self._text

    def push(self, token_id: int) -> None:
        """Add one token; sets `stop_reason` when a stop string is complete."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            if len(self._ids) - self._read > _MAX_PENDING:
                self._wait_no_longer(before, after)
            return
        self._advance(after[len(before) :], len(self._ids))

    def finish(self) -> None:
        """No token will follow: what was held back as an incomplete character is text now."""
        if self.is_stopped or self._read == len(self._ids):
            return
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        self._grow(after[len(before) :])
        self._read = len(self._ids)

    def take(self, *, final: bool) -> str:
        """The text that is certain and was not taken before."""
        end = len(self._text) if final or self.is_stopped else self._num_certain()
        start = self._num_emitted
        self._num_emitted = max(end, start)
        return self._text[start:end]

    def _wait_no_longer(self, before: str, after: str) -> None:
        """Too many tokens wait: leave out those without text, and take what is certain."""
        # Special tokens have no text whatever follows.
        self._ids[self._read :] = [one for one in self._ids[self._read :] if self._decode([one])]
        end = len(self._ids) - 1
        certain = self._decode(self._ids[self._prefix : end])
        # Bytes that are no characters: with one more of them, those before stay what they are.
        if end - self._read >= _MAX_PENDING and len(certain) < len(after):
            self._advance(certain[len(before) :], end)

    def _advance(self, addition: str, end: int) -> None:
        """The text of the tokens before `end` is certain."""
        self._grow(addition)
        self._prefix, self._read = self._read, end

    def _grow(self, addition: str) -> None:
        searched_from = max(0, len(self._text) - self._longest_stop + 1)
        self._text += addition
        found = [
            (at, text) for text in self._stop if (at := self._text.find(text, searched_from)) != -1
        ]
        if found:
            at, self.stop_reason = min(found)
            self._text = self._text[:at]

    def _num_certain(self) -> int:
        """Length of the text without a tail that could be the start of a stop string."""
        for length in range(min(self._longest_stop - 1, len(self._text)), 0, -1):
            tail = self._text[-length:]
            if any(text.startswith(tail) for text in self._stop):
                return len(self._text) - length
        return len(self._text)
