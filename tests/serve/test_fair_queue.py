"""Tenants of one class take turns by tokens."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate_serve.fair_queue import FairQueue
from quantgate_serve.request import Request, SamplingParams


def request_of(tenant: str, cost: int = 10, *, weight: float = 1.0) -> Request:
    return Request([2], SamplingParams(max_tokens=cost - 1), tenant=tenant, weight=weight)


def test_one_tenant_s_requests_keep_their_order() -> None:
    queue = FairQueue()
    requests = [request_of("a", cost) for cost in (50, 2, 9)]
    for request in requests:
        queue.push(request)
    assert [queue.take() for _ in requests] == requests


def test_a_flood_is_followed_by_the_other_s_only_request_after_one_turn() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.push(request_of("flood"))
    for _ in range(3):
        queue.take()
    other = request_of("other")
    queue.push(other)
    assert other in [queue.take(), queue.take()]


def test_tenants_share_by_tokens_not_by_requests() -> None:
    queue = FairQueue()
    for _ in range(200):
        queue.push(request_of("long", 40))
        queue.push(request_of("short", 10))
    tokens: Counter[str] = Counter()
    for _ in range(100):
        request = queue.take()
        tokens[request.tenant] += request.cost
    assert abs(tokens["long"] - tokens["short"]) <= 40


def test_a_weight_of_three_gets_three_times_the_tokens() -> None:
    queue = FairQueue()
    for _ in range(200):
        queue.push(request_of("a", weight=3.0))
        queue.push(request_of("b"))
    served = Counter(queue.take().tenant for _ in range(100))
    assert served == {"a": 75, "b": 25}


def test_who_was_away_neither_saved_up_turns_nor_pays_for_old_ones() -> None:
    queue = FairQueue()
    for _ in range(10):
        queue.push(request_of("early"))
    for _ in range(10):
        queue.take()
    for _ in range(4):
        queue.push(request_of("early"))
        queue.push(request_of("late"))
    assert Counter(queue.take().tenant for _ in range(4)) == {"early": 2, "late": 2}


def test_what_a_request_left_unused_is_its_tenant_s_again() -> None:
    queue = FairQueue()
    for _ in range(8):
        queue.push(request_of("a", 100))
        queue.push(request_of("b", 100))
    order = []
    for _ in range(8):
        request = queue.take()
        order.append(request.tenant)
        if request.tenant == "a":
            queue.refund(request, 50)
    # Half the price, twice the turns; a refund counts from the turn after the next.
    assert Counter(order) == {"a": 5, "b": 3}


def test_discarded_requests_have_no_turn() -> None:
    queue = FairQueue()
    requests = [request_of(tenant) for tenant in "aab"]
    for request in requests:
        queue.push(request)
    queue.discard(requests[0])
    queue.discard(requests[1])
    assert (queue.head(), len(queue)) == (requests[2], 1)
    queue.discard(requests[2])
    assert queue.head() is None
    assert queue.oldest is None
    with pytest.raises(IndexError):
        queue.take()


def test_tenants_that_left_are_forgotten() -> None:
    queue = FairQueue()
    for _ in range(3):
        queue.push(request_of("steady"))
    for tenant in range(2000):
        queue.push(request_of("steady"))
        queue.push(request_of(str(tenant)))
        queue.take()
        queue.take()
    assert len(queue) == 3
    assert len(queue._shares) < 200
    while len(queue):
        queue.take()
    assert len(queue._shares) == 0


ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from(["probe", "a", "b", "c"]), st.integers(2, 60), st.integers(0, 2)
    ),  # tenant, cost, how many are taken afterwards
    min_size=1,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(arrivals=ARRIVALS)
def test_nobody_waits_for_more_than_the_stated_tokens(
    arrivals: list[tuple[str, int, int]],
) -> None:
    """Ahead of a request go its own tenant's, and of each other tenant at most as many tokens as
    its own tenant has ahead (or took beyond its share just before), and one request more."""
    queue = FairQueue()
    largest = 60
    bound: dict[int, float] = {}
    waited: dict[int, int] = {}
    finish = 0.0

    def take() -> None:
        nonlocal finish
        taken = queue.take()
        if taken.tenant == "probe":
            finish = queue._clock + taken.cost
        assert waited.pop(taken.id) <= bound.pop(taken.id)
        for id in waited:
            waited[id] += taken.cost

    for tenant, cost, takes in arrivals:
        request = request_of(tenant, cost)
        own = sum(other.cost for other in queue.requests if other.tenant == tenant)
        share = queue._shares.get(tenant)
        debt = 0.0 if share is None else max(0.0, share.finish - queue._clock)
        if share is not None and own:
            debt += largest  # its head may have been listed before the last one was charged
        bound[request.id] = own + 3 * (own + debt + largest)
        waited[request.id] = 0
        queue.push(request)
        for _ in range(min(takes, len(queue))):
            take()
    while len(queue):
        take()
