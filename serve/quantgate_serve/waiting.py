"""Which class is served next: the most urgent, but the others age.

A class that has a request older than `aging_s` is *overdue*: from then on it gets one token in
`AGED_PART` of those given away, whatever waits above it. So its requests wait at most `aging_s`
and the time for `AGED_PART` times the tokens that go before them in their own class, while a more
urgent class never loses more than one part to each class below it.
"""

from bisect import insort
from dataclasses import dataclass

from quantgate_serve.fair_queue import FairQueue
from quantgate_serve.request import Priority, Request

AGED_PART = 8


@dataclass(frozen=True, slots=True)
class Turn:
    """A request that may start now, and whether it may because its class is overdue."""

    request: Request
    is_aged: bool


class _Class:
    """One class's requests: those that lost their place while running, then the others."""

    def __init__(self) -> None:
        self.fresh = FairQueue()
        # In order of `seat`: who started first continues first.
        self.returning: list[Request] = []
        # Tokens that go to others before this class has its next turn by age.
        self.owed = 0

    def __len__(self) -> int:
        return len(self.fresh) + len(self.returning)

    def head(self) -> Request | None:
        return self.returning[0] if self.returning else self.fresh.head()

    def oldest_ns(self) -> int | None:
        """When the oldest arrived; None when nobody waits."""
        times = [request.arrived_ns for request in self.returning]
        oldest = self.fresh.oldest
        if oldest is not None:
            times.append(oldest.arrived_ns)
        return min(times, default=None)


class WaitingRequests:
    """All requests that wait, by class and tenant."""

    def __init__(self, *, aging_ns: int) -> None:
        self._aging_ns = aging_ns
        self._classes = {priority: _Class() for priority in Priority}
        self._size = 0
        self.num_aged = 0

    def __len__(self) -> int:
        return self._size

    def count(self, priority: Priority) -> int:
        return len(self._classes[priority])

    @property
    def requests(self) -> list[Request]:
        """Everyone, the most urgent class first."""
        return [
            request
            for queue in self._classes.values()
            for request in (*queue.returning, *queue.fresh.requests)
        ]

    @property
    def has_returning(self) -> bool:
        return any(queue.returning for queue in self._classes.values())

    @property
    def oldest_ns(self) -> int | None:
        """When the one that waits longest arrived."""
        times = [queue.oldest_ns() for queue in self._classes.values()]
        return min((time for time in times if time is not None), default=None)

    def push(self, request: Request) -> None:
        self._classes[request.priority].fresh.push(request)
        self._size += 1

    def put_back(self, request: Request) -> None:
        """A preempted request waits again, before everyone who has not started yet."""
        insort(self._classes[request.level].returning, request, key=lambda r: r.seat)
        self._size += 1

    def turn(self, now_ns: int) -> Turn | None:
        """Whose turn it is; nothing changes until it is taken."""
        first: Request | None = None
        for queue in self._classes.values():
            if not queue:
                continue
            if first is None:
                first = queue.head()
            elif queue.owed <= 0 and self._is_overdue(queue, now_ns):
                head = queue.head()
                if head is not None:
                    return Turn(head, is_aged=True)
        return None if first is None else Turn(first, is_aged=False)

    def take(self, turn: Turn) -> None:
        """Remove the request of `turn`, which nothing happened to since."""
        request = turn.request
        own = self._classes[self._class_of(request)]
        if own.returning and own.returning[0] is request:
            own.returning.pop(0)
        else:
            own.fresh.take()
        self._size -= 1
        for queue in self._classes.values():
            if queue is not own and queue.owed > 0:
                queue.owed -= request.cost
        if turn.is_aged:
            own.owed += (AGED_PART - 1) * request.cost
            self.num_aged += 1

    def discard(self, request: Request) -> None:
        """Remove a request that will not be computed."""
        queue = self._classes[self._class_of(request)]
        if request.num_preemptions:
            queue.returning.remove(request)
        else:
            queue.fresh.discard(request)
        self._size -= 1

    def refund(self, request: Request, tokens: int) -> None:
        """`request` ended `tokens` short of its cost."""
        self._classes[request.priority].fresh.refund(request, tokens)

    def _class_of(self, request: Request) -> Priority:
        """Where it waits: where it ran, if it has run."""
        return request.level if request.num_preemptions else request.priority

    def _is_overdue(self, queue: _Class, now_ns: int) -> bool:
        oldest_ns = queue.oldest_ns()
        return oldest_ns is not None and now_ns - oldest_ns >= self._aging_ns
