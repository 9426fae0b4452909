"""Who has run out of time."""

import pytest

from quantgate_serve.deadlines import Deadlines
from quantgate_serve.request import Request, RequestState, SamplingParams


def request_of(deadline_ns: int | None) -> Request:
    return Request([2], SamplingParams(), deadline_ns=deadline_ns)


@pytest.mark.parametrize(("now_ns", "is_expired"), [(99, False), (100, True), (101, True)])
def test_a_request_expires_at_its_deadline(now_ns: int, is_expired: bool) -> None:
    deadlines = Deadlines()
    request = request_of(100)
    deadlines.add(request)
    assert deadlines.take_expired(now_ns) == ([request] if is_expired else [])
    assert deadlines.take_expired(now_ns) == []


def test_finished_requests_and_those_without_a_deadline_never_expire() -> None:
    deadlines = Deadlines()
    finished = request_of(5)
    deadlines.add(finished)
    deadlines.add(request_of(None))
    finished.state = RequestState.FINISHED
    assert deadlines.next_ns is None
    assert deadlines.take_expired(10**18) == []


def test_the_nearest_comes_first() -> None:
    deadlines = Deadlines()
    requests = [request_of(at) for at in (30, 10, 20)]
    for request in requests:
        deadlines.add(request)
    assert deadlines.next_ns == 10
    assert deadlines.take_expired(20) == [requests[1], requests[2]]


def test_requests_that_ended_early_are_not_kept_until_their_deadline() -> None:
    deadlines = Deadlines()
    for _ in range(10_000):
        request = request_of(10**18)
        deadlines.add(request)
        request.state = RequestState.FINISHED
    assert len(deadlines._heap) < 200
