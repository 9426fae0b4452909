"""Which unfinished requests have run out of time."""

import heapq

from quantgate_serve.request import Request


class Deadlines:
    """The requests that have a deadline, the nearest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._prune_at = 64

    def add(self, request: Request) -> None:
        if request.deadline_ns is None:
            return
        heapq.heappush(self._heap, (request.deadline_ns, request.id, request))
        if len(self._heap) >= self._prune_at:
            # Most requests end long before their deadline and must not be kept until then.
            self._heap = [entry for entry in self._heap if not entry[2].is_finished]
            heapq.heapify(self._heap)
            self._prune_at = 64 + 2 * len(self._heap)

    @property
    def next_ns(self) -> int | None:
        """The nearest one; None when nothing unfinished has any."""
        while self._heap and self._heap[0][2].is_finished:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_expired(self, now_ns: int) -> list[Request]:
        """Remove and return the unfinished requests whose deadline is now or was before."""
        expired = []
        while self._heap and self._heap[0][0] <= now_ns:
            request = heapq.heappop(self._heap)[2]
            if not request.is_finished:
                expired.append(request)
        return expired
