"""Who may join the queue: bounds on a request's size, on queued requests and on queued tokens."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from quantgate_serve.request import Request


class QueueFullError(Exception):
    """The queue takes no more; the client should come back after `retry_after_s`."""

    def __init__(self, message: str, *, reason: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class RequestTooLongError(Exception):
    """Prompt and max_tokens can never fit."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What the engine takes on. `max_request_tokens` is the smaller of context and KV pool."""

    context_length: int
    max_request_tokens: int
    max_queued_requests: int
    max_queued_tokens: int


class Admission:
    """Counts what is queued: any thread enters requests, the engine's takes them out."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.num_requests = 0
        self.num_tokens = 0
        self._lock = threading.Lock()

    def enter(self, requests: Sequence[Request]) -> None:
        """Count `requests` as queued, all or none.

        Raises:
            RequestTooLongError: one can never fit.
            QueueFullError: too much is queued already.
        """
        for request in requests:
            self._check_size(request.num_prompt, request.params.max_tokens)
        tokens = sum(request.cost for request in requests)
        with self._lock:
            self._check_room(len(requests), tokens)
            self.num_requests += len(requests)
            self.num_tokens += tokens

    def leave(self, request: Request) -> None:
        """The request is computed now, or will never be."""
        with self._lock:
            self.num_requests -= 1
            self.num_tokens -= request.cost

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

    def _check_room(self, count: int, tokens: int) -> None:
        limits = self.limits
        if self.num_requests + count > limits.max_queued_requests:
            raise QueueFullError(
                f"{self.num_requests} requests are queued, the limit is "
                f"{limits.max_queued_requests}. Try again later.",
                reason="queued_requests",
                retry_after_s=1,
            )
        # Into an empty queue anything goes: it fits the KV cache, so waiting would not help it.
        if self.num_requests and self.num_tokens + tokens > limits.max_queued_tokens:
            raise QueueFullError(
                f"{self.num_tokens} tokens are queued, the limit is "
                f"{limits.max_queued_tokens}. Try again later.",
                reason="queued_tokens",
                retry_after_s=1,
            )
