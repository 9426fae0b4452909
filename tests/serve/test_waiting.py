"""The most urgent class first, and nobody for ever last."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate_serve.request import Priority, Request, SamplingParams
from quantgate_serve.waiting import AGED_PART, WaitingRequests

INTERACTIVE, NORMAL, BULK = Priority
AGING_NS = 1000


def request_of(
    priority: Priority, *, cost: int = 10, tenant: str = "", arrived_ns: int = 0
) -> Request:
    return Request(
        [2],
        SamplingParams(max_tokens=cost - 1),
        priority=priority,
        tenant=tenant,
        arrived_ns=arrived_ns,
    )


def take(waiting: WaitingRequests, now_ns: int) -> Request:
    turn = waiting.turn(now_ns)
    assert turn is not None
    waiting.take(turn)
    return turn.request


def test_classes_go_in_order_of_urgency() -> None:
    waiting = WaitingRequests(aging_ns=AGING_NS)
    requests = [request_of(priority) for priority in (BULK, NORMAL, INTERACTIVE)]
    for request in requests:
        waiting.push(request)
    assert [take(waiting, 0) for _ in requests] == requests[::-1]
    assert waiting.turn(0) is None


@pytest.mark.parametrize(("now_ns", "first"), [(AGING_NS - 1, INTERACTIVE), (AGING_NS, BULK)])
def test_a_class_is_overdue_from_the_aging_time_on(now_ns: int, first: Priority) -> None:
    waiting = WaitingRequests(aging_ns=AGING_NS)
    waiting.push(request_of(BULK))
    waiting.push(request_of(INTERACTIVE, arrived_ns=now_ns))
    assert take(waiting, now_ns).priority is first
    assert waiting.num_aged == (1 if first is BULK else 0)


def test_an_overdue_class_gets_its_part_and_no_more() -> None:
    waiting = WaitingRequests(aging_ns=AGING_NS)
    for _ in range(1000):
        waiting.push(request_of(INTERACTIVE))
        waiting.push(request_of(BULK))
    served = Counter(take(waiting, AGING_NS).priority for _ in range(800))
    assert served == {INTERACTIVE: 700, BULK: 100}


def test_both_lower_classes_have_a_part_of_their_own() -> None:
    waiting = WaitingRequests(aging_ns=AGING_NS)
    for _ in range(1000):
        for priority in Priority:
            waiting.push(request_of(priority))
    served = Counter(take(waiting, AGING_NS).priority for _ in range(800))
    assert served == {INTERACTIVE: 600, NORMAL: 100, BULK: 100}


def test_parts_are_counted_in_tokens() -> None:
    waiting = WaitingRequests(aging_ns=AGING_NS)
    for _ in range(1000):
        waiting.push(request_of(INTERACTIVE, cost=10))
    for _ in range(10):
        waiting.push(request_of(BULK, cost=100))
    tokens: Counter[Priority] = Counter()
    for _ in range(500):
        request = take(waiting, AGING_NS)
        tokens[request.priority] += request.cost
    assert tokens[BULK] / sum(tokens.values()) == pytest.approx(1 / AGED_PART, rel=0.15)


def test_a_class_whose_oldest_is_served_is_not_overdue_any_more() -> None:
    waiting = WaitingRequests(aging_ns=AGING_NS)
    for arrived_ns in (0, 900):
        waiting.push(request_of(BULK, arrived_ns=arrived_ns))
    for _ in range(30):
        waiting.push(request_of(INTERACTIVE, arrived_ns=900))
    served = [take(waiting, AGING_NS).priority for _ in range(30)]
    assert served.count(BULK) == 1


def test_who_lost_its_place_comes_before_everyone_of_its_class() -> None:
    waiting = WaitingRequests(aging_ns=AGING_NS)
    first, second, fresh = (request_of(NORMAL) for _ in range(3))
    for request, seat in ((second, 1), (first, 0)):
        request.seat, request.num_preemptions = seat, 1
    waiting.push(fresh)
    waiting.put_back(second)
    waiting.put_back(first)
    assert [take(waiting, 0) for _ in range(3)] == [first, second, fresh]


def test_discarded_requests_are_gone_from_every_count() -> None:
    waiting = WaitingRequests(aging_ns=AGING_NS)
    fresh, returning = request_of(BULK), request_of(BULK)
    returning.seat, returning.num_preemptions = 0, 1
    waiting.push(fresh)
    waiting.put_back(returning)
    waiting.discard(returning)
    assert (len(waiting), waiting.count(BULK), waiting.requests) == (1, 1, [fresh])
    waiting.discard(fresh)
    assert (len(waiting), waiting.oldest_ns, waiting.turn(9 * AGING_NS)) == (0, None, None)


LARGEST = 50


@settings(max_examples=150, deadline=None)
@given(
    backlog=st.lists(
        st.tuples(st.sampled_from([NORMAL, BULK]), st.sampled_from("ab"), st.integers(2, LARGEST)),
        min_size=1,
        max_size=30,
    ),
    interactive=st.lists(st.integers(2, LARGEST), min_size=1, max_size=8),
)
def test_the_wait_of_every_class_is_bounded_under_endless_interactive_load(
    backlog: list[tuple[Priority, str, int]], interactive: list[int]
) -> None:
    """From the moment a request is overdue, at most AGED_PART * (D + 2 * largest) tokens are given
    away before it, where D is what goes before it in its own class: see docs/serving.md."""
    waiting = WaitingRequests(aging_ns=AGING_NS)
    bound: dict[int, int] = {}
    for priority, tenant, cost in backlog:
        request = request_of(priority, cost=cost, tenant=tenant)
        mine = [other for other in waiting.requests if other.priority is priority]
        own = sum(other.cost for other in mine if other.tenant == tenant)
        ahead = own + (own + LARGEST)  # one other tenant
        bound[request.id] = AGED_PART * (ahead + 2 * LARGEST)
        waiting.push(request)
    given_away = 0
    arrivals = 0
    while bound:
        while waiting.count(INTERACTIVE) < 3:  # never empty: ten times what can be served
            cost = interactive[arrivals % len(interactive)]
            waiting.push(request_of(INTERACTIVE, cost=cost, tenant="c", arrived_ns=AGING_NS))
            arrivals += 1
        request = take(waiting, AGING_NS)
        if request.id in bound:
            assert given_away <= bound.pop(request.id)
        given_away += request.cost
