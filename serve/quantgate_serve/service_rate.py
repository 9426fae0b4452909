"""How fast the engine works off requests, and how long it takes for one, in tokens of cost."""

import math

# Long enough to smooth over prompts and decodes, short enough to follow a change of load.
_MEMORY_S = 10.0
# Less observed time than this is a burst that has just begun.
_MIN_SECONDS = 0.25
# How much of the latest request's pace enters the mean.
_PACE_WEIGHT = 1 / 32


class ServiceRate:
    """An average over the last seconds in which requests waited.

    While nobody waits the engine works only as fast as requests come, which says nothing about how
    long a queue would take.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        # From the first step to the end, over the cost that was asked for; None before any ended.
        self.s_per_token: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """None until requests have waited for a while."""
        if self._seconds < _MIN_SECONDS or self._tokens <= 0:
            return None
        return self._tokens / self._seconds

    def observe_end(self, cost: int, seconds: float) -> None:
        """A request of `cost` ended well, `seconds` after its first step."""
        pace = seconds / cost
        if self.s_per_token is None:
            self.s_per_token = pace
        else:
            self.s_per_token += (pace - self.s_per_token) * _PACE_WEIGHT

    def observe(self, tokens: int, seconds: float) -> None:
        """`tokens` were served in `seconds`, with requests waiting all the time."""
        decay = math.exp(-seconds / _MEMORY_S)
        self._tokens = self._tokens * decay + tokens
        self._seconds = self._seconds * decay + seconds
