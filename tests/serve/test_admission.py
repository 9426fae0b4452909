"""Who is let into the queue, and what those who are not are told."""

import pytest

from quantgate_serve.admission import (
    Admission,
    AdmissionLimits,
    QueueFullError,
    RequestTooLongError,
    TooManyAtOnceError,
)
from quantgate_serve.request import Priority, Request, SamplingParams

INTERACTIVE, NORMAL, BULK = Priority
SECOND = 1_000_000_000


def request_of(
    priority: Priority = NORMAL,
    *,
    cost: int = 10,
    tenant: str = "",
    deadline_ns: int | None = None,
) -> Request:
    return Request(
        [2],
        SamplingParams(max_tokens=cost - 1),
        priority=priority,
        tenant=tenant,
        deadline_ns=deadline_ns,
    )


def make_admission(*, requests: int = 80, tokens: int = 8000, now_ns: int = 0) -> Admission:
    limits = AdmissionLimits(1000, 1000, requests, tokens, aging_s=5.0)
    return Admission(limits, clock=lambda: now_ns)


def fill(admission: Admission, *args: object, **kwargs: object) -> QueueFullError:
    """Enter one request after another until one is refused."""
    for _ in range(10_000):
        try:
            admission.enter([request_of(*args, **kwargs)])  # type: ignore[arg-type]
        except QueueFullError as error:
            return error
    raise AssertionError("never refused: the queue is unbounded")


@pytest.mark.parametrize(("priority", "expected"), [(INTERACTIVE, 60), (NORMAL, 50), (BULK, 50)])
def test_one_class_alone_fills_what_is_not_kept_for_the_others(
    priority: Priority, expected: int
) -> None:
    admission = make_admission()
    assert fill(admission, priority).reason == "queued_requests"
    assert admission.num_requests == expected


@pytest.mark.parametrize(("priority", "most"), [(INTERACTIVE, 60), (NORMAL, 50), (BULK, 50)])
def test_what_an_empty_queue_would_not_take_is_told_not_to_come_back(
    priority: Priority, most: int
) -> None:
    make_admission().enter([request_of(priority)] * most)
    with pytest.raises(TooManyAtOnceError, match=f"{most + 1} answers .* at most {most} of class"):
        make_admission().enter([request_of(priority)] * (most + 1))


def test_whatever_fills_the_queue_each_class_finds_its_part() -> None:
    admission = make_admission()
    for first in (BULK, NORMAL, INTERACTIVE):
        fill(admission, first)
    assert admission.num_requests == 80
    for priority, kept in ((INTERACTIVE, 20), (NORMAL, 10), (BULK, 10)):
        assert admission._loads[priority].requests >= kept


def test_tokens_are_bounded_as_requests_are() -> None:
    admission = make_admission(requests=10_000)
    assert fill(admission, BULK, cost=100).reason == "queued_tokens"
    assert admission.num_tokens == 5000


def test_into_an_empty_class_anything_goes_that_fits_the_cache() -> None:
    admission = make_admission(tokens=100)
    for priority in Priority:
        admission.enter([request_of(priority, cost=900)])
        with pytest.raises(QueueFullError):
            admission.enter([request_of(priority, cost=2)])
    with pytest.raises(RequestTooLongError):
        make_admission().enter([request_of(cost=1001)])


def test_several_requests_enter_together_or_not_at_all() -> None:
    admission = make_admission(requests=8)
    admission.enter([request_of() for _ in range(4)])
    with pytest.raises(QueueFullError):
        admission.enter([request_of(), request_of()])
    assert (admission.num_requests, admission.num_tokens) == (4, 40)


def test_who_leaves_makes_room() -> None:
    admission = make_admission()
    inside = request_of(tenant="a")
    admission.enter([inside])
    fill(admission)
    admission.leave(inside)
    admission.enter([request_of()])
    with pytest.raises(QueueFullError):
        admission.enter([request_of()])


def test_a_tenant_may_queue_no_more_than_it_leaves_free() -> None:
    admission = make_admission()
    error = fill(admission, tenant="flood")
    assert error.reason == "tenant_share"
    assert admission.num_requests == 25  # half of the class's fifty
    second = fill(admission, tenant="second")
    assert second.reason == "tenant_share"
    assert admission._loads[NORMAL].requests_of["second"] == 13  # of the 25 left
    admission.enter([request_of(tenant="third")])


def test_without_names_there_are_no_shares() -> None:
    assert fill(make_admission()).reason == "queued_requests"


def test_retry_after_is_a_second_until_the_rate_is_known() -> None:
    assert fill(make_admission(), cost=100).retry_after_s == 1


def test_retry_after_is_what_is_too_much_over_the_rate() -> None:
    admission = make_admission(requests=10_000)
    fill(admission, cost=100)
    admission.tokens_per_s = 100.0
    with pytest.raises(QueueFullError) as refused:
        admission.enter([request_of(cost=700)])
    assert refused.value.retry_after_s == 7


def test_a_lower_class_counts_what_is_above_it_but_not_beyond_its_own_part() -> None:
    admission = make_admission(requests=10_000)
    admission.tokens_per_s = 1000.0
    fill(admission, BULK, cost=100)
    assert fill(admission, BULK, cost=100).retry_after_s == 1
    for _ in range(20):
        admission.enter([request_of(INTERACTIVE, cost=100)])
    # 2000 tokens above it and 100 of its own at 1000 a second ...
    assert fill(admission, BULK, cost=100).retry_after_s == 3
    admission.tokens_per_s = 100.0
    # ... but at 100 a second its class is overdue after 5 s and has an eighth: 5 + 8 * 100 / 100.
    assert fill(admission, BULK, cost=100).retry_after_s == 13


def test_retry_after_has_a_bound() -> None:
    admission = make_admission()
    admission.tokens_per_s = 0.001
    assert fill(admission, cost=100).retry_after_s == 600


@pytest.mark.parametrize(("left_s", "is_refused"), [(9.9, True), (10.0, False), (10.1, False)])
def test_a_wait_beyond_half_the_time_to_the_deadline_is_refused(
    left_s: float, is_refused: bool
) -> None:
    admission = make_admission(now_ns=7 * SECOND)
    admission.enter([request_of(cost=500)])
    admission.tokens_per_s = 100.0
    request = request_of(cost=600, deadline_ns=int((7 + left_s) * SECOND))
    if not is_refused:
        admission.enter([request])
        return
    with pytest.raises(QueueFullError, match=r"the queue takes about 5\.0 s") as refused:
        admission.enter([request])
    assert (refused.value.reason, refused.value.retry_after_s) == ("deadline", 1)


# It waits 5 s, and 800 steps take 8 s, of which a quarter more is reserved.
@pytest.mark.parametrize(("left_s", "is_refused"), [(14.9, True), (15.1, False)])
def test_a_wait_that_leaves_no_time_to_compute_is_refused(left_s: float, is_refused: bool) -> None:
    admission = make_admission()
    admission.enter([request_of(cost=500)])
    admission.tokens_per_s, admission.s_per_step = 100.0, 0.01
    request = request_of(cost=800, deadline_ns=int(left_s * SECOND))
    if is_refused:
        with pytest.raises(QueueFullError, match=r"the queue takes about 5\.0 s"):
            admission.enter([request])
    else:
        admission.enter([request])


def test_an_empty_queue_refuses_nobody_for_its_deadline() -> None:
    admission = make_admission()
    admission.tokens_per_s, admission.s_per_step = 100.0, 1.0
    admission.enter([request_of(cost=900, deadline_ns=1)])


def test_an_unknown_rate_refuses_nobody_for_its_deadline() -> None:
    admission = make_admission()
    admission.enter([request_of(cost=900)])
    admission.enter([request_of(cost=900, deadline_ns=1)])


def test_the_expected_wait_of_a_light_tenant_is_its_turn() -> None:
    admission = make_admission(requests=10_000)
    admission.tokens_per_s = 100.0
    for _ in range(20):
        admission.enter([request_of(cost=100, tenant="heavy")])
    assert admission.expected_wait_s(NORMAL, "light", 100) == 2.0
    assert admission.expected_wait_s(NORMAL, "heavy", 100) == 20.0
