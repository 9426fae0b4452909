"""How long requests are held for company, and what is told of it."""

import pytest

from quantgate_serve.admission_window import AdmissionWindow
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.waiting import WaitingRequests


def waiting_since(*arrived_ns: int) -> WaitingRequests:
    waiting = WaitingRequests(aging_ns=10**9)
    for at in arrived_ns:
        request = Request([1], SamplingParams(max_tokens=1))
        request.arrived_ns = at
        waiting.push(request)
    return waiting


@pytest.mark.parametrize(
    ("now_ns", "num_running", "until_ns"),
    [
        (100, 0, 600),
        (599, 0, 600),
        (600, 0, None),
        (601, 0, None),
        (100, 1, 600),
        (100, 2, None),
        (100, 3, None),
    ],
)
def test_a_request_is_held_until_its_window_ends_or_enough_are_there(
    now_ns: int, num_running: int, until_ns: int | None
) -> None:
    window = AdmissionWindow(window_ns=500, fill=3)
    waiting = waiting_since(100)
    assert window.held_until_ns(waiting, now_ns, num_running=num_running) == until_ns


def test_nobody_is_held_without_a_window_or_a_request() -> None:
    no_window = AdmissionWindow(window_ns=0, fill=3)
    assert no_window.held_until_ns(waiting_since(100), 100, num_running=0) is None
    window = AdmissionWindow(window_ns=500, fill=3)
    assert window.held_until_ns(waiting_since(), 100, num_running=0) is None
    assert no_window.waits == window.waits == []


def test_who_lost_its_place_is_not_held() -> None:
    window = AdmissionWindow(window_ns=500, fill=3)
    waiting = waiting_since(100)
    turn = waiting.turn(100)
    assert turn is not None
    waiting.take(turn)
    turn.request.num_preemptions = 1
    waiting.put_back(turn.request)
    assert window.held_until_ns(waiting, 100, num_running=0) is None


def test_each_one_s_wait_is_told_once_when_the_hold_ends() -> None:
    window = AdmissionWindow(window_ns=500, fill=4)
    waiting = waiting_since(100, 400)
    window.held_until_ns(waiting, 200, num_running=0)
    assert window.waits == []
    for now_ns in (600, 700):
        assert window.held_until_ns(waiting, now_ns, num_running=0) is None
    assert window.waits == [400 / 1e9, 200 / 1e9]
