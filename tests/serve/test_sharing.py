"""One computation for all who ask the same: who joins, who may not, and who ends it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from quantgate_serve.admission import QueueFullError
from quantgate_serve.caches import BoundedCache
from quantgate_serve.metrics import FrontMetrics
from quantgate_serve.request import (
    Delta,
    FinishReason,
    Origin,
    Priority,
    Request,
    RequestError,
    RequestState,
    SamplingParams,
    TokenLogprob,
)
from quantgate_serve.sharing import Sharing

GREEDY = SamplingParams(max_tokens=3)


class HandEngine:
    """Computes when it is told to: each request's next token is the number of those before."""

    def __init__(self) -> None:
        self.epoch = 1
        self.front = FrontMetrics()
        self.running: list[Request] = []
        self.is_full = False

    def submit(self, requests: Sequence[Request]) -> None:
        if self.is_full:
            raise QueueFullError("full", reason="queued_requests", retry_after_s=1)
        self.running += requests

    def abort(self, requests: Sequence[Request]) -> None:
        self.running = [request for request in self.running if request not in requests]

    def step(self) -> None:
        for request in list(self.running):
            request.logprobs.append(TokenLogprob(request.num_output, -1.0))
            request.token_ids.append(request.num_output)
            if request.num_output == request.params.max_tokens:
                self.end(request, FinishReason.LENGTH)
            elif request.is_streaming and request.listener is not None:
                request.listener(Delta(request, request.num_output, "x", False))

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self.running.remove(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.error = None if error is None else RequestError(error, "out_of_memory")
        if request.listener is not None:
            request.listener(Delta(request, request.num_output, "x", True))


class Client:
    """A request and what its client heard."""

    def __init__(self, *, streams: bool = False, prompt: tuple[int, ...] = (5, 6), **values: Any):
        self.heard: list[tuple[int, str, bool]] = []
        params = values.pop("params", GREEDY)
        self.request = Request(list(prompt), params, is_streaming=streams, **values)
        self.request.listener = lambda delta: self.heard.append(
            (delta.num_output, delta.text, delta.is_last)
        )


@pytest.fixture
def engine() -> HandEngine:
    return HandEngine()


def sharing_over(engine: HandEngine, *, kept_bytes: int = 0, coalesces: bool = True) -> Sharing:
    caches: list[BoundedCache[Request]] = [
        BoundedCache(max_bytes=kept_bytes, ttl_s=60.0) for _ in range(2)
    ]
    return Sharing(engine, coalesces=coalesces, response_cache=caches[0], embedding_cache=caches[1])


def ask(sharing: Sharing, *clients: Client) -> None:
    sharing.submit([client.request for client in clients])


def test_two_who_ask_the_same_are_computed_once_and_both_answered(engine: HandEngine) -> None:
    sharing = sharing_over(engine)
    first, second = Client(), Client()
    ask(sharing, first)
    engine.step()
    ask(sharing, second)
    assert len(engine.running) == 1
    engine.step()
    engine.step()
    for client in (first, second):
        assert client.heard == [(3, "x", True)]
        assert client.request.output_ids == [0, 1, 2]
        assert len(client.request.logprobs) == 3
    assert [c.request.origin for c in (first, second)] == [Origin.COMPUTED, Origin.COALESCED]
    assert second.request.num_cached == 2
    assert engine.front.coalesced_requests == 1


def test_who_joins_a_stream_late_hears_all_of_it(engine: HandEngine) -> None:
    sharing = sharing_over(engine)
    first, second = Client(streams=True), Client(streams=True)
    ask(sharing, first)
    engine.step()
    engine.step()
    ask(sharing, second)
    engine.step()
    assert first.heard == [(1, "x", False), (2, "x", False), (3, "x", True)]
    assert second.heard == [(2, "xx", False), (3, "x", True)]


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": (5, 7)},
        {"tenant": "other"},
        {"priority": Priority.BULK},
        {"deadline_ns": 1 << 62},
        {"params": replace(GREEDY, max_tokens=4)},
        {"params": replace(GREEDY, stop=("x",))},
        {"params": replace(GREEDY, num_logprobs=1)},
        {"params": replace(GREEDY, grammar="g")},
        {"params": replace(GREEDY, embeds=True)},
        {"params": replace(GREEDY, temperature=1.0)},
    ],
    ids=str,
)
def test_what_differs_is_computed_apart(engine: HandEngine, other: dict[str, Any]) -> None:
    sharing = sharing_over(engine)
    ask(sharing, Client())
    ask(sharing, Client(**other))
    assert len(engine.running) == 2


def test_two_samples_are_never_the_same_request(engine: HandEngine) -> None:
    sharing = sharing_over(engine, kept_bytes=100_000)
    sampled = replace(GREEDY, temperature=1.0, seed=7)
    for _ in range(2):
        ask(sharing, Client(params=sampled))
    assert len(engine.running) == 2


@pytest.mark.parametrize("change", [{"seed": 9}, {"top_p": 0.5}, {"temperature": 9.0, "top_k": 1}])
def test_what_a_greedy_choice_does_not_look_at_does_not_part(
    engine: HandEngine, change: dict[str, Any]
) -> None:
    sharing = sharing_over(engine)
    ask(sharing, Client(), Client(params=replace(GREEDY, **change)))
    assert len(engine.running) == 1


def test_one_who_leaves_does_not_end_it_for_the_others_and_the_last_does(
    engine: HandEngine,
) -> None:
    sharing = sharing_over(engine)
    clients = [Client(), Client(), Client()]
    ask(sharing, *clients)
    sharing.abort([clients[0].request])
    engine.step()
    assert len(engine.running) == 1
    sharing.abort([clients[1].request])
    assert len(engine.running) == 1
    sharing.abort([clients[2].request])
    assert engine.running == []
    assert [client.heard for client in clients] == [[], [], []]
    assert all(client.request.finish_reason is FinishReason.ABORT for client in clients)
    ask(sharing, Client())
    assert len(engine.running) == 1, "an abandoned computation must not be joined"


def test_leaving_after_the_end_changes_nothing(engine: HandEngine) -> None:
    sharing = sharing_over(engine)
    client = Client()
    ask(sharing, client)
    for _ in range(3):
        engine.step()
    sharing.abort([client.request])
    assert client.request.finish_reason is FinishReason.LENGTH


def test_a_failure_reaches_all_and_is_not_kept(engine: HandEngine) -> None:
    sharing = sharing_over(engine, kept_bytes=100_000)
    clients = [Client(), Client()]
    ask(sharing, *clients)
    engine.end(engine.running[0], FinishReason.ERROR, "too large")
    assert [c.request.error.message for c in clients if c.request.error] == ["too large"] * 2
    ask(sharing, Client())
    assert len(engine.running) == 1


def test_a_full_queue_refuses_all_and_leaves_nothing_behind(engine: HandEngine) -> None:
    sharing = sharing_over(engine)
    engine.is_full = True
    with pytest.raises(QueueFullError):
        ask(sharing, Client(), Client())
    engine.is_full = False
    ask(sharing, Client())
    assert len(engine.running) == 1


def test_an_answer_is_kept_for_its_tenant_and_said_to_be_kept(engine: HandEngine) -> None:
    sharing = sharing_over(engine, kept_bytes=100_000, coalesces=False)
    ask(sharing, Client(tenant="a"))
    for _ in range(3):
        engine.step()
    again, stream = Client(tenant="a"), Client(tenant="a", streams=True)
    other = Client(tenant="b")
    ask(sharing, again, stream, other)
    assert [request.tenant for request in engine.running] == ["b"]
    for client in (again, stream):
        assert client.request.origin is Origin.CACHED
        assert client.request.output_ids == [0, 1, 2]
        assert client.request.num_cached == 2
        assert [(n, last) for n, _, last in client.heard] == [(3, True)]
    assert engine.front.cache_queries["response"] == 4
    assert engine.front.cache_hits["response"] == 2


def test_what_is_off_counts_nothing(engine: HandEngine) -> None:
    sharing = sharing_over(engine, coalesces=False)
    ask(sharing, Client(), Client())
    assert len(engine.running) == 2
    assert engine.front.coalesced_requests is None
    assert not engine.front.cache_queries
    assert not engine.front.cache_hits


def test_what_is_kept_does_not_keep_its_clients(engine: HandEngine) -> None:
    sharing = sharing_over(engine, kept_bytes=100_000)
    ask(sharing, Client(), Client())
    work = engine.running[0]
    for _ in range(3):
        engine.step()
    assert len(sharing.response_cache) == 1
    assert work.listener is None


def test_other_weights_know_no_old_answer(engine: HandEngine) -> None:
    sharing = sharing_over(engine, kept_bytes=100_000)
    ask(sharing, Client())
    engine.epoch = 2  # changed while the first was under way
    for _ in range(3):
        engine.step()
    sharing.forget()
    ask(sharing, Client())
    assert len(engine.running) == 1


def test_a_client_with_a_deadline_is_answered_from_the_cache(engine: HandEngine) -> None:
    sharing = sharing_over(engine, kept_bytes=100_000)
    ask(sharing, Client())
    for _ in range(3):
        engine.step()
    hurried = Client(deadline_ns=1 << 62)
    ask(sharing, hurried)
    assert hurried.request.origin is Origin.CACHED
