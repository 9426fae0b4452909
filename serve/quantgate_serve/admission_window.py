"""Whether those that wait are held a little longer, so that others can join their first step."""

from quantgate_serve.waiting import WaitingRequests


class AdmissionWindow:
    """Holds a request at most `window_ns` after its arrival, and only while few are there."""

    def __init__(self, *, window_ns: int, fill: int) -> None:
        """Nobody is held where `fill` or more run and wait, or where `window_ns` is 0."""
        self._window_ns = window_ns
        self._fill = fill
        self._held_since_ns: int | None = None
        # How long each request that was held was held, in seconds; who reads it empties it.
        self.waits: list[float] = []

    def held_until_ns(
        self, waiting: WaitingRequests, now_ns: int, *, num_running: int
    ) -> int | None:
        """When the hold of `waiting` ends; None where they may start now."""
        oldest_ns = None
        if (
            self._window_ns > 0
            and waiting
            and len(waiting) + num_running < self._fill
            and not waiting.has_returning
        ):
            oldest_ns = waiting.oldest_ns
        if oldest_ns is None or now_ns >= oldest_ns + self._window_ns:
            self._end_hold(waiting, now_ns)
            return None
        if self._held_since_ns is None:
            self._held_since_ns = now_ns
        return oldest_ns + self._window_ns

    def _end_hold(self, waiting: WaitingRequests, now_ns: int) -> None:
        if self._held_since_ns is None:
            return
        since_ns, self._held_since_ns = self._held_since_ns, None
        self.waits += [
            (now_ns - max(since_ns, request.arrived_ns)) / 1e9 for request in waiting.requests
        ]
