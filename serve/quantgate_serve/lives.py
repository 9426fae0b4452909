"""The recent requests' lives: when each reached which station, in milliseconds after its arrival.

A bounded ring in the front. Prompts and answers are not kept, and a tenant is only a keyed hash
that holds for this process, so that the page can be shown to someone who serves but may not read.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from time import perf_counter_ns, time_ns
from typing import Any

from quantgate_serve.request import Request

MAX_LIVES = 512


@dataclass(frozen=True, slots=True)
class Life:
    """One request. Times are milliseconds after its arrival; None where it has not been yet."""

    id: int
    arrived: str
    priority: str
    tenant: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    tokenized_ms: float | None
    queued_ms: float | None
    admitted_ms: float | None
    first_token_ms: float | None
    last_token_ms: float | None
    finished_ms: float | None
    finish_reason: str | None
    error: str | None

    @property
    def end_ms(self) -> float:
        """The last station that it reached."""
        stations = (self.queued_ms, self.admitted_ms, self.last_token_ms, self.finished_ms)
        return max((at for at in stations if at is not None), default=0.0)


# What a life is told from. Taken as it is when a request ends: its client waits meanwhile.
_taken = attrgetter(
    *("id", "arrived_ns", "priority", "tenant", "num_prompt", "num_cached", "num_output"),
    *("num_preemptions", "tokenized_ns", "queued_ns", "scheduled_ns", "first_token_ns"),
    *("last_token_ns", "finished_ns", "finish_reason", "error"),
)


class Lives:
    """The last `max_lives` requests that ended. One thread uses it."""

    def __init__(self, max_lives: int = MAX_LIVES) -> None:
        self._ended: deque[tuple[Any, ...]] = deque(maxlen=max_lives)
        self._secret = os.urandom(16)
        # perf_counter_ns has no date; the two clocks are compared once.
        self._epoch_ns = time_ns() - perf_counter_ns()

    def add(self, request: Request) -> None:
        """Remember `request`, which has ended."""
        self._ended.append(_taken(request))

    def recent(self, in_flight: Iterable[Request] = ()) -> list[Life]:
        """Those in flight, the oldest first, then those that ended, the newest first."""
        return [self._life(taken) for taken in (*map(_taken, in_flight), *reversed(self._ended))]

    def _life(self, taken: tuple[Any, ...]) -> Life:
        id, arrived_ns, priority, tenant, prompt, cached, output, preemptions = taken[:8]
        stations_ns, finish_reason, error = taken[8:14], *taken[14:]

        def after(at_ns: int) -> float | None:
            return round((at_ns - arrived_ns) / 1e6, 3) if at_ns else None

        tokenized, queued, admitted, first_token, last_token, finished = map(after, stations_ns)
        arrived = datetime.fromtimestamp((self._epoch_ns + arrived_ns) / 1e9, tz=UTC)
        return Life(
            id=id,
            arrived=arrived.isoformat(timespec="milliseconds"),
            priority=priority.label,
            tenant=self._hash(tenant),
            prompt_tokens=prompt,
            cached_tokens=cached,
            output_tokens=output,
            preemptions=preemptions,
            tokenized_ms=tokenized,
            queued_ms=queued,
            admitted_ms=admitted,
            first_token_ms=first_token,
            last_token_ms=last_token,
            finished_ms=finished,
            finish_reason=None if finish_reason is None else finish_reason.value,
            error=None if error is None else error.code,
        )

    def _hash(self, tenant: str) -> str:
        return hashlib.blake2b(tenant.encode(), key=self._secret, digest_size=4).hexdigest()
