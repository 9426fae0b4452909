"""Which requests have a seat, and which of them gives way first: the newest of the least urgent."""

from quantgate_serve.request import Priority, Request


class RunningRequests:
    """All requests that run, by the class in which they do (`level`)."""

    def __init__(self) -> None:
        # Each class in order of `seat`: the last of the last class is the first to give way.
        self._classes: dict[Priority, dict[int, Request]] = {priority: {} for priority in Priority}
        self._num_seated = 0

    def __len__(self) -> int:
        return sum(map(len, self._classes.values()))

    @property
    def requests(self) -> list[Request]:
        """The most urgent class first, each in the order in which they first started."""
        return [request for level in self._classes.values() for request in level.values()]

    @property
    def last(self) -> Request | None:
        """The newest of the least urgent class that runs."""
        for level in reversed(self._classes.values()):
            if level:
                return next(reversed(level.values()))
        return None

    def less_urgent(self, priority: Priority) -> list[Request]:
        """Those that a request of `priority` may interrupt."""
        return [
            request
            for level, requests in self._classes.items()
            if level > priority
            for request in requests.values()
        ]

    def seat(self, request: Request) -> None:
        """Give it the next `seat`, or its old place if it has run before."""
        level = self._classes[request.level]
        level[request.id] = request
        if request.seat < 0:
            request.seat = self._num_seated
            self._num_seated += 1
        else:
            ordered = sorted(level.values(), key=lambda other: other.seat)
            self._classes[request.level] = {other.id: other for other in ordered}

    def remove(self, request: Request) -> None:
        del self._classes[request.level][request.id]
