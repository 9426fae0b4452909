"""How fast the engine works off requests, in tokens of cost, and how long each step takes one."""

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
        # From the first step to the end, over the steps; None before any ended. Steps and not
        # cost: a prompt takes one or a few steps, however long, and each output token takes one.
        self.s_per_step: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """None until requests have waited for a while."""
        if self._seconds < _MIN_SECONDS or self._tokens <= 0:
            return None
        return self._tokens / self._seconds

    def observe_end(self, num_steps: int, seconds: float) -> None:
        """A request of `num_steps` ended well, `seconds` after its first step."""
        pace = seconds / num_steps
        if self.s_per_step is None:
            self.s_per_step = pace
        else:
            self.s_per_step += (pace - self.s_per_step) * _PACE_WEIGHT

    def observe(self, tokens: int, seconds: float) -> None:
        """`tokens` were served in `seconds`, with requests waiting all the time."""
        decay = math.exp(-seconds / _MEMORY_S)
        self._tokens = self._tokens * decay + tokens
        self._seconds = self._seconds * decay + seconds
