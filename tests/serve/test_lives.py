"""The ring of recent requests: which stations, in which order, how many, and what it hides."""

from time import perf_counter_ns

import pytest

from quantgate_serve.lives import Lives
from quantgate_serve.request import FinishReason, Priority, Request, RequestError, SamplingParams


def lived(**changes: int) -> Request:
    """A request with 1 ms to tokenise, 2 to queue, 10 in it, 20 of prefill and 60 of decode."""
    start = perf_counter_ns()
    times = {
        "arrived_ns": 0,
        "tokenized_ns": 1,
        "queued_ns": 2,
        "scheduled_ns": 12,
        "first_token_ns": 32,
        "last_token_ns": 90,
        "finished_ns": 92,
    } | changes
    request = Request([1, 2, 3], SamplingParams(), priority=Priority.BULK, tenant="acme")
    for name, at_ms in times.items():
        setattr(request, name, 0 if at_ms < 0 else start + at_ms * 1_000_000)
    request.token_ids += [7, 8]
    request.finish_reason = FinishReason.STOP
    return request


def test_a_life_is_told_in_milliseconds_after_arrival() -> None:
    lives = Lives()
    lives.add(lived())
    (life,) = lives.recent()
    stations = (
        life.tokenized_ms,
        life.queued_ms,
        life.admitted_ms,
        life.first_token_ms,
        life.last_token_ms,
        life.finished_ms,
    )
    assert stations == (1, 2, 12, 32, 90, 92)
    assert (life.prompt_tokens, life.output_tokens, life.priority) == (3, 2, "bulk")
    assert (life.finish_reason, life.error) == ("stop", None)


def test_a_station_that_was_not_reached_is_none() -> None:
    request = lived(scheduled_ns=-1, first_token_ns=-1, last_token_ns=-1)
    request.error = RequestError("gone", "deadline_expired")
    lives = Lives()
    lives.add(request)
    (life,) = lives.recent()
    assert (life.admitted_ms, life.first_token_ms, life.last_token_ms) == (None, None, None)
    assert (life.finished_ms, life.error) == (92, "deadline_expired")


def test_the_ring_is_bounded_and_the_newest_comes_first() -> None:
    lives = Lives(max_lives=3)
    requests = [lived() for _ in range(5)]
    for request in requests:
        lives.add(request)
    assert [life.id for life in lives.recent()] == [r.id for r in reversed(requests[2:])]


def test_requests_in_flight_come_before_those_that_ended() -> None:
    lives = Lives()
    ended, running = lived(), lived(finished_ns=-1)
    running.finish_reason = None
    lives.add(ended)
    assert [life.id for life in lives.recent([running])] == [running.id, ended.id]
    assert lives.recent([running])[0].finish_reason is None


def test_a_tenant_is_a_hash_that_holds_for_this_process_only() -> None:
    first, second = Lives(), Lives()
    for lives in (first, second):
        lives.add(lived())
        lives.add(lived())
    assert len({life.tenant for life in first.recent()}) == 1
    assert first.recent()[0].tenant != second.recent()[0].tenant
    assert "acme" not in repr(first.recent())


@pytest.mark.parametrize("secret", ["prompt_ids", "token_ids", "text"])
def test_what_was_asked_and_answered_is_not_kept(secret: str) -> None:
    lives = Lives()
    lives.add(lived())
    assert not hasattr(lives.recent()[0], secret)
