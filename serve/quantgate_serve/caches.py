"""Answers kept for a while: bounded in bytes and in age, the least recently used dropped first; and
what was made of the last object."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from time import monotonic
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Values by key. One thread uses it."""

    def __init__(
        self, *, max_bytes: int, ttl_s: float, clock: Callable[[], float] = monotonic
    ) -> None:
        """`max_bytes` 0 switches it off: nothing is kept."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._ttl_s = ttl_s
        self._clock = clock
        # The value, its bytes, and when it is too old; the least recently used first.
        self._entries: OrderedDict[Hashable, tuple[Value, int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_on(self) -> bool:
        return self.max_bytes > 0

    def get(self, key: Hashable) -> Value | None:
        """The value, unless it is unknown or too old."""
        if not self.is_on:
            return None
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, _, expires = entry
        if self._clock() >= expires:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return value

    def put(self, key: Hashable, value: Value, *, num_bytes: int) -> None:
        """Keep `value`, dropping others until it fits; one that never fits is not kept."""
        if num_bytes > self.max_bytes:
            return
        if key in self._entries:
            self._drop(key)
        while self.num_bytes + num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = (value, num_bytes, self._clock() + self._ttl_s)
        self.num_bytes += num_bytes

    def clear(self) -> None:
        """Forget everything: other weights would answer otherwise."""
        self._entries.clear()
        self.num_bytes = 0

    def _drop(self, key: Hashable) -> None:
        _, num_bytes, _ = self._entries.pop(key)
        self.num_bytes -= num_bytes


def keep_last(function: Callable[[Any], Value]) -> Callable[[Any], Value]:
    """`function`, which is asked about the same object many times in a row: called once for it."""
    last: tuple[object, Value] | None = None

    def call(argument: Any) -> Value:
        nonlocal last
        found = last
        if found is None or found[0] is not argument:
            found = last = (argument, function(argument))
        return found[1]

    return call
