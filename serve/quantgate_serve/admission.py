"""Who may join the queue: bounds on a request's size, on queued requests and on queued tokens.

Each class keeps a part of the queue that the others cannot fill, each named tenant may queue no
more than it leaves free, and a request that would only wait for its deadline is told so at once.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

from quantgate_serve.request import Priority, Request
from quantgate_serve.waiting import AGED_PART

# What of the queue is kept for a class while it does not use it. The rest is for whoever comes.
KEPT = {Priority.INTERACTIVE: 1 / 4, Priority.NORMAL: 1 / 8, Priority.BULK: 1 / 8}
# How much of the time to its deadline a request may be expected to wait, at most: never so much
# that computing it would take the rest. Without such a reserve an overloaded queue settles where
# each request waits just as long as it may, and everyone's time runs out while running.
WAIT_PART = 0.5
# What is reserved for computing, over what it has taken so far: half of all requests take longer.
SERVICE_MARGIN = 1.25
_MAX_RETRY_S = 600


class QueueFullError(Exception):
    """The queue takes no more; the client should come back after `retry_after_s`."""

    def __init__(self, message: str, *, reason: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class RequestTooLongError(Exception):
    """Prompt and max_tokens can never fit."""


class TooManyAtOnceError(Exception):
    """More requests in one go than an empty queue takes."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What the engine takes on. `max_request_tokens` is the smaller of context and KV pool."""

    context_length: int
    max_request_tokens: int
    max_queued_requests: int
    max_queued_tokens: int
    aging_s: float = 5.0
    max_batched_tokens: int = 512


@dataclass(slots=True)
class _Load:
    """What is queued of one class, in requests and in tokens."""

    requests: int = 0
    tokens: int = 0
    requests_of: Counter[str] = field(default_factory=Counter)  # by tenant
    tokens_of: Counter[str] = field(default_factory=Counter)

    def add(self, request: Request, sign: int) -> None:
        self.requests += sign
        self.tokens += sign * request.cost
        self.requests_of[request.tenant] += sign
        self.tokens_of[request.tenant] += sign * request.cost
        if not self.requests_of[request.tenant]:
            del self.requests_of[request.tenant], self.tokens_of[request.tenant]


class Admission:
    """Counts what is queued: any thread enters requests, the engine's takes them out."""

    def __init__(
        self, limits: AdmissionLimits, *, clock: Callable[[], int] = perf_counter_ns
    ) -> None:
        self.limits = limits
        # How fast a queue is worked off (see ServiceRate); None while nobody knows. Known to the
        # front only: the engine counts again what that let in, and must not think otherwise.
        self.tokens_per_s: float | None = None
        # How long one request takes once it has begun, per step; None while nobody knows.
        self.s_per_step: float | None = None
        self._clock = clock
        self._loads = {priority: _Load() for priority in Priority}
        self._lock = threading.Lock()

    @property
    def num_requests(self) -> int:
        return sum(load.requests for load in self._loads.values())

    @property
    def num_tokens(self) -> int:
        return sum(load.tokens for load in self._loads.values())

    def enter(self, requests: Sequence[Request]) -> None:
        """Count `requests`, of one class, tenant and deadline, as queued, all or none.

        Raises:
            RequestTooLongError: one can never fit.
            TooManyAtOnceError: together they can never fit.
            QueueFullError: too much is queued already, or the deadline would pass in the queue.
        """
        if not requests:
            return
        for request in requests:
            self._check_size(request.num_prompt, request.params.max_tokens)
        with self._lock:
            self._check_room(requests)
            self._check_deadline(requests)
            for request in requests:
                self._loads[request.priority].add(request, 1)

    def leave(self, request: Request) -> None:
        """The request is computed now, or will never be."""
        with self._lock:
            self._loads[request.priority].add(request, -1)

    def expected_wait_s(self, priority: Priority, tenant: str, tokens: int) -> float | None:
        """How long a request of `tokens` would wait if it came now; None when the rate is unknown.

        No more than its turn takes: a tenant with little in the queue does not wait for the end of
        another's (see `fair_queue.py`).
        """
        load = self._loads[priority]
        tenants = len(load.tokens_of.keys() | {tenant})
        ahead = min(load.tokens, tenants * (load.tokens_of.get(tenant, 0) + tokens))
        return self._drain_s(priority, ahead)

    def _check_size(self, num_prompt: int, max_tokens: int) -> None:
        limits = self.limits
        wanted = num_prompt + max_tokens
        if wanted <= limits.max_request_tokens:
            return
        if limits.max_request_tokens < limits.context_length:
            bound = f"the KV cache holds {limits.max_request_tokens} tokens"
        else:
            bound = f"this model's context length is {limits.context_length} tokens"
        raise RequestTooLongError(
            f"{bound}, but {num_prompt} prompt tokens and max_tokens {max_tokens} need {wanted}. "
            "Shorten the prompt or lower max_tokens."
        )

    def _check_room(self, requests: Sequence[Request]) -> None:
        limits, priority, tenant = self.limits, requests[0].priority, requests[0].tenant
        load = self._loads[priority]
        count, tokens = len(requests), sum(request.cost for request in requests)
        most = self._room(priority, limits.max_queued_requests, dict.fromkeys(Priority, 0))
        if count > most:
            raise TooManyAtOnceError(
                f"{count} answers are asked for at once, and the queue takes at most {most} of "
                f"class {priority.label}. Send fewer prompts, or a smaller n, in one request."
            )
        request_room = self._room(
            priority, limits.max_queued_requests, {p: x.requests for p, x in self._loads.items()}
        )
        token_room = self._room(
            priority, limits.max_queued_tokens, {p: x.tokens for p, x in self._loads.items()}
        )
        mean_tokens = load.tokens / load.requests if load.requests else 0.0
        if count > request_room:
            raise self._full(
                "queued_requests",
                f"{self.num_requests} requests are queued, {load.requests} of them "
                f"{priority.label}; the limit is {limits.max_queued_requests}, "
                "of which each class keeps a part.",
                priority,
                (count - request_room) * mean_tokens,
            )
        # Into an empty class anything goes: it fits the KV cache, so waiting would not help it.
        if load.requests and tokens > token_room:
            raise self._full(
                "queued_tokens",
                f"{self.num_tokens} tokens are queued, {load.tokens} of them {priority.label}; "
                f"the limit is {limits.max_queued_tokens}, of which each class keeps a part.",
                priority,
                tokens - token_room,
            )
        own_requests, own_tokens = load.requests_of.get(tenant, 0), load.tokens_of.get(tenant, 0)
        excess = max(
            own_tokens + tokens - token_room,
            (own_requests + count - request_room) * mean_tokens,
        )
        if tenant and own_requests and excess > 0:
            raise self._full(
                "tenant_share",
                f"tenant {tenant} has {own_requests} {priority.label} requests with {own_tokens} "
                "tokens queued and may not queue more than it leaves free for others.",
                priority,
                # Each token served counts twice: less of its own, more that is free.
                excess / 2 * len(load.tokens_of),
            )

    def _room(self, priority: Priority, limit: int, used: dict[Priority, int]) -> int:
        """What `priority` may still queue, leaving to the others what is kept for them."""
        kept = sum(
            max(0, int(limit * share) - used[other])
            for other, share in KEPT.items()
            if other is not priority
        )
        return limit - sum(used.values()) - kept

    def _check_deadline(self, requests: Sequence[Request]) -> None:
        first = requests[0]
        tokens = sum(request.cost for request in requests)
        wait_s = self.expected_wait_s(first.priority, first.tenant, tokens)
        if first.deadline_ns is None or wait_s is None:
            return
        left_s = max(0.0, (first.deadline_ns - self._clock()) / 1e9)
        num_steps = max(self._num_steps(request) for request in requests)
        service_s = SERVICE_MARGIN * num_steps * (self.s_per_step or 0.0)
        bound_s = max(0.0, min(left_s * WAIT_PART, left_s - service_s))
        if wait_s > bound_s:
            raise QueueFullError(
                f"the queue takes about {wait_s:.1f} s, too long for a deadline in {left_s:.1f} s. "
                "Try again later.",
                reason="deadline",
                retry_after_s=_whole_seconds(wait_s - bound_s),
            )

    def _num_steps(self, request: Request) -> int:
        """Steps that computing all of `request` takes at least."""
        prompt = math.ceil(request.num_prompt / self.limits.max_batched_tokens)
        return prompt + request.params.max_tokens

    def _full(self, reason: str, message: str, priority: Priority, tokens: float) -> QueueFullError:
        seconds = self._drain_s(priority, tokens)
        return QueueFullError(
            f"{message} Try again later.",
            reason=reason,
            retry_after_s=_whole_seconds(1.0 if seconds is None else seconds),
        )

    def _drain_s(self, priority: Priority, tokens: float) -> float | None:
        """How long until `tokens` of `priority` are served, with what is queued above them.

        The more urgent classes go first and those below take their aged parts; at the latest the
        class is overdue and has a part of its own.
        """
        rate = self.tokens_per_s
        if rate is None:
            return None
        above = sum(load.tokens for other, load in self._loads.items() if other < priority)
        below = sum(load.tokens > 0 for other, load in self._loads.items() if other > priority)
        in_turn_s = (above + tokens) / (rate * (1 - below / AGED_PART))
        if above == 0:
            return in_turn_s
        return min(in_turn_s, self.limits.aging_s + tokens * AGED_PART / rate)


def _whole_seconds(seconds: float) -> int:
    return min(max(1, math.ceil(seconds)), _MAX_RETRY_S)
