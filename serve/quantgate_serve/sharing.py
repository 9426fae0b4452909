"""Computes a deterministic request once, however many clients of a tenant ask for it.

Stands between the routes and the engine. A greedy request joins one like it that is under way, or
is answered from the response cache; every other request goes straight through. Each client keeps a
request of its own, which follows the computed one; the engine stops when the last of them left.

What may differ between two requests with one answer: seed, and what else does not touch a greedy
choice. What keeps them apart: tenant, weights, prompt, parameters. Those under way must also agree
in priority and in whether text is wanted step by step, and have no deadline: a patient client must
not lose its answer to a hurried one's.

Who is answered without the engine costs it nothing, and is not counted against any limit of it.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter_ns
from typing import Protocol

from quantgate_serve.caches import BoundedCache
from quantgate_serve.channel import progress, set_progress
from quantgate_serve.metrics import FrontMetrics
from quantgate_serve.request import (
    Delta,
    FinishReason,
    Origin,
    Request,
    RequestState,
    SamplingParams,
)

# CPython's sizes, rounded up: a token is an int in two lists, and some text.
_REQUEST_BYTES = 2_000
_TOKEN_BYTES = 64
_LOGPROB_BYTES = 200
_PAIR_BYTES = 120
_FLOAT_BYTES = 32


class Engine(Protocol):
    """What Sharing needs of the engine's client."""

    # Changes with the weights that serve.
    epoch: int
    front: FrontMetrics

    def submit(self, requests: Sequence[Request]) -> None: ...

    def abort(self, requests: Sequence[Request]) -> None: ...


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """What an answer depends on."""

    epoch: int
    tenant: str
    prompt_sha256: bytes
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class FlightKey:
    """What requests under way must have in common beyond their answer."""

    answer: AnswerKey
    priority: int
    has_text: bool


@dataclass(slots=True, eq=False)
class Flight:
    """A request that the engine computes, and those who wait for it."""

    key: FlightKey | None
    answer: AnswerKey
    work: Request
    followers: list[Request] = field(default_factory=list)
    # What the text was when it was last told, for those who join later.
    text: str = ""


class Sharing:
    """The engine as the routes use it. Every method is for the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        coalesces: bool,
        response_cache: BoundedCache[Request],
        embedding_cache: BoundedCache[Request],
    ) -> None:
        self.response_cache = response_cache
        self.embedding_cache = embedding_cache
        self._engine = engine
        self._coalesces = coalesces
        self._flights: dict[FlightKey, Flight] = {}
        self._flight_of: dict[int, Flight] = {}
        front = engine.front
        if coalesces:
            front.coalesced_requests = 0
        for name, cache in (("response", response_cache), ("embedding", embedding_cache)):
            if cache.is_on:
                front.cache_queries[name] = front.cache_hits[name] = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue what must be computed, all or none; raises as the engine's submit does.

        Afterwards each request's `origin` says where its answer comes from.
        """
        known: list[tuple[Request, Request]] = []
        joining: list[tuple[Request, Flight]] = []
        new: dict[FlightKey | int, Flight] = {}
        direct: list[Request] = []
        for request in requests:
            answer = self._answer_key(request)
            if answer is None:
                direct.append(request)
                continue
            found = self._look_up(request, answer)
            if found is not None:
                known.append((request, found))
                continue
            key = self._flight_key(request, answer)
            flight = None if key is None else (self._flights.get(key) or new.get(key))
            if flight is not None:
                joining.append((request, flight))
            elif key is not None or self._cache_of(request).is_on:
                flight = Flight(key, answer, _work_of(request))
                new[request.id if key is None else key] = flight
                joining.append((request, flight))
            else:
                direct.append(request)
        computed = [*direct, *(flight.work for flight in new.values())]
        if computed:
            self._engine.submit(computed)
        for flight in new.values():
            flight.work.listener = self._listener(flight)
            if flight.key is not None:
                self._flights[flight.key] = flight
        for request, flight in joining:
            self._join(request, flight)
        for request, found in known:
            _answer_from(request, found)

    def abort(self, requests: Sequence[Request]) -> None:
        """Give up `requests`; what nobody waits for any more is not computed."""
        deserted: list[Request] = []
        for request in requests:
            flight = self._flight_of.pop(request.id, None)
            if flight is None:
                deserted.append(request)
                continue
            flight.followers.remove(request)
            request.state = RequestState.FINISHED
            request.finish_reason = FinishReason.ABORT
            if not flight.followers:
                deserted.append(flight.work)
                self._land(flight)
        self._engine.abort(deserted)

    def forget(self) -> None:
        """The weights have changed: no answer holds any more."""
        self.response_cache.clear()
        self.embedding_cache.clear()

    def _answer_key(self, request: Request) -> AnswerKey | None:
        params = request.params
        if not params.is_greedy or not (self._coalesces or self._cache_of(request).is_on):
            return None
        # What a greedy choice does not look at.
        neutral = replace(params, seed=0, temperature=0.0, top_p=1.0, top_k=0)
        digest = hashlib.sha256(array("q", request.prompt_ids).tobytes()).digest()
        return AnswerKey(self._engine.epoch, request.tenant, digest, neutral)

    def _flight_key(self, request: Request, answer: AnswerKey) -> FlightKey | None:
        if not self._coalesces or request.deadline_ns is not None:
            return None
        return FlightKey(answer, request.priority, request.text is not None)

    def _cache_of(self, request: Request) -> BoundedCache[Request]:
        return self.embedding_cache if request.params.embeds else self.response_cache

    def _look_up(self, request: Request, answer: AnswerKey) -> Request | None:
        cache = self._cache_of(request)
        if not cache.is_on:
            return None
        found = cache.get(answer)
        name = "embedding" if request.params.embeds else "response"
        self._engine.front.cache_queries[name] += 1
        self._engine.front.cache_hits[name] += found is not None
        return found

    def _join(self, request: Request, flight: Flight) -> None:
        work = flight.work
        if flight.followers:
            request.origin = Origin.COALESCED
            front = self._engine.front
            front.coalesced_requests = (front.coalesced_requests or 0) + 1
        flight.followers.append(request)
        self._flight_of[request.id] = flight
        _follow(request, work)
        if request.is_streaming and work.num_output:
            _tell(request, Delta(request, work.num_output, flight.text, False))

    def _listener(self, flight: Flight) -> Callable[[Delta], None]:
        def hear(delta: Delta) -> None:
            flight.text += delta.text
            followers = list(flight.followers)  # a listener may leave
            if delta.is_last:
                self._land(flight)
                if delta.request.error is None:
                    self._keep(flight)
            for follower in followers:
                # Until the end what grows is in lists and a text that both have.
                if delta.is_last:
                    _follow(follower, delta.request)
                if delta.is_last or follower.is_streaming:
                    _tell(follower, Delta(follower, delta.num_output, delta.text, delta.is_last))

        return hear

    def _keep(self, flight: Flight) -> None:
        if flight.answer.epoch == self._engine.epoch:
            cache = self._cache_of(flight.work)
            cache.put(flight.answer, flight.work, num_bytes=_bytes_of(flight.work))

    def _land(self, flight: Flight) -> None:
        if flight.key is not None:
            self._flights.pop(flight.key, None)
        for follower in flight.followers:
            self._flight_of.pop(follower.id, None)
        # What is kept must not keep its clients.
        flight.followers = []
        flight.work.listener = None


def _work_of(request: Request) -> Request:
    """The request that is computed for `request` and those like it."""
    return replace(request, listener=None, id=Request.next_id())


def _follow(request: Request, work: Request) -> None:
    """Have `request` show what `work` has: its lists are the same, its own arrival stays."""
    origin = request.origin
    set_progress(request, progress(work))
    request.origin = origin
    request.token_ids = work.token_ids
    request.logprobs = work.logprobs
    request.prompt_logprobs = work.prompt_logprobs
    request.text = work.text
    if origin is not Origin.COMPUTED:
        request.num_cached = request.num_prompt  # nothing of it was computed for this client


def _answer_from(request: Request, found: Request) -> None:
    """Answer `request` at once with the finished `found`."""
    request.origin = Origin.CACHED
    wants_text = request.text is not None and found.text is None
    text = request.text
    _follow(request, found)
    if wants_text and text is not None:
        for token in found.output_ids[: -1 if found.ended_by_eos else None]:
            text.push(token)
        text.finish()
        request.text = text
    now = perf_counter_ns()
    request.scheduled_ns = request.first_token_ns = request.finished_ns = now
    whole = "" if request.text is None else request.text.text
    _tell(request, Delta(request, request.num_output, whole, True))


def _tell(request: Request, delta: Delta) -> None:
    if request.listener is not None:
        request.listener(delta)


def _bytes_of(request: Request) -> int:
    """About what a finished request holds in memory."""
    entries = [*request.logprobs, *request.prompt_logprobs]
    pairs = sum(len(entry.top) + len(entry.of_token_ids) for entry in entries)
    vector = 0 if request.embedding is None else _FLOAT_BYTES * len(request.embedding)
    return (
        _REQUEST_BYTES
        + _TOKEN_BYTES * len(request.token_ids)
        + _LOGPROB_BYTES * len(entries)
        + _PAIR_BYTES * pairs
        + vector
    )
