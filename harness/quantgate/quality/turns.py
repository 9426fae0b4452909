"""Which piece of work is next, where a few workers share the queues of several models.

A queue is what one server is asked: its pieces are done in order and one at a time, since two would
meet in its batches. A free worker takes the longest queue that nobody is at, so that all of them
come to their end together and no core waits for the last server of another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some work, and about how much: sizes are compared with each other, in whatever unit."""

    name: str
    size: float
    work: Callable[[], None]
    is_ready: Callable[[], bool] = _always
    """Asked whenever a worker is free: may only turn true by what another piece does."""


def take_turns(
    queues: Mapping[str, Sequence[Piece]], *, workers: int
) -> dict[str, dict[str, float]]:
    """Does every piece of every queue; among equals the queue that is named first comes first.

    Returns:
        The seconds that each piece took, by queue and name.

    Raises:
        Exception: what a piece raised; pieces that had not begun are left undone.
    """
    turns = _Turns(queues)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for future in [pool.submit(turns.work) for _ in range(workers)]:
            future.result()
    return turns.seconds


class _Turns:
    def __init__(self, queues: Mapping[str, Sequence[Piece]]) -> None:
        self._queues = {name: deque(pieces) for name, pieces in queues.items()}
        self.seconds: dict[str, dict[str, float]] = {name: {} for name in queues}
        self._busy: set[str] = set()
        self._has_failed = False
        self._changed = threading.Condition()

    def work(self) -> None:
        """What one worker does, until nothing is left."""
        while (name := self._take()) is not None:
            piece, started = self._queues[name][0], time.perf_counter()
            try:
                piece.work()
                self.seconds[name][piece.name] = time.perf_counter() - started
            except BaseException:
                self._has_failed = True
                raise
            finally:
                with self._changed:
                    # Only now, so that what is under way counts as left.
                    self._queues[name].popleft()
                    self._busy.discard(name)
                    self._changed.notify_all()

    def _take(self) -> str | None:
        with self._changed:
            while not self._has_failed and any(self._queues.values()):
                free = [n for n, q in self._queues.items() if q and n not in self._busy]
                ready = [name for name in free if self._queues[name][0].is_ready()]
                if ready:
                    name = max(ready, key=self._left)
                    self._busy.add(name)
                    return name
                if not self._busy:
                    raise RuntimeError(f"nothing is under way that {free} could wait for")
                self._changed.wait()
        return None

    def _left(self, name: str) -> float:
        return sum(piece.size for piece in self._queues[name])
