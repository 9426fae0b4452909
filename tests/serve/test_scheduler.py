"""Who is computed next, and who gives way."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.request import (
    FinishReason,
    Priority,
    Request,
    RequestState,
    SamplingParams,
)
from quantgate_serve.scheduler import Chunk, Scheduler, SchedulerLimits


def make_scheduler(
    *, num_pages: int = 64, batch: int = 8, tokens: int = 32, cached: bool = False
) -> Scheduler:
    pool = PagePool(num_pages)
    return Scheduler(
        pool,
        SchedulerLimits(max_batch_size=batch, max_batched_tokens=tokens),
        prefix_cache=PrefixCache(pool) if cached else None,
    )


def request_of(
    length: int,
    *,
    max_tokens: int = 8,
    first: int = 2,
    priority: Priority = Priority.NORMAL,
    tenant: str = "",
) -> Request:
    return Request(
        [first + i % 50 for i in range(length)],
        SamplingParams(max_tokens=max_tokens),
        priority=priority,
        tenant=tenant,
        cache_root=tenant,
    )


def run_dry(scheduler: Scheduler) -> list[Request]:
    """Steps until nothing is left; the requests in the order in which they were first planned."""
    order: dict[int, Request] = {}
    while scheduler.has_work:
        plan = scheduler.schedule()
        order |= {
            chunk.request.id: chunk.request for chunk in plan if chunk.request.id not in order
        }
        compute(scheduler, plan)
        scheduler.check_integrity()
    return list(order.values())


def compute(scheduler: Scheduler, plan: list[Chunk]) -> None:
    """What the engine does with a plan, without a model."""
    for chunk in plan:
        is_last = chunk.is_last
        scheduler.commit(chunk)
        if is_last:
            chunk.request.token_ids.append(3)
            if chunk.request.num_output >= chunk.request.params.max_tokens:
                scheduler.finish(chunk.request, FinishReason.LENGTH)


def test_decodes_come_before_prompts() -> None:
    scheduler = make_scheduler(tokens=16)
    first = request_of(10)
    scheduler.add(first)
    compute(scheduler, scheduler.schedule())
    second = request_of(40)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert [(chunk.request, chunk.length) for chunk in plan] == [(first, 1), (second, 15)]


def test_the_token_budget_bounds_every_step() -> None:
    scheduler = make_scheduler(tokens=20)
    for length in (50, 3, 30):
        scheduler.add(request_of(length))
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert 0 < sum(chunk.length for chunk in plan) <= 20
        compute(scheduler, plan)


def test_requests_are_admitted_in_order_of_arrival() -> None:
    scheduler = make_scheduler(batch=1)
    requests = [request_of(5, max_tokens=1) for _ in range(4)]
    for request in requests:
        scheduler.add(request)
    order = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        order += [chunk.request for chunk in plan]
        compute(scheduler, plan)
    assert order == requests


def test_the_newest_gives_its_pages_and_returns_to_the_head_of_the_queue() -> None:
    scheduler = make_scheduler(num_pages=5, tokens=64)
    old, new, later = request_of(31, max_tokens=40), request_of(20, max_tokens=40), request_of(4)
    for request in (old, new, later):
        scheduler.add(request)
    while not scheduler.num_preemptions:
        compute(scheduler, scheduler.schedule())
        scheduler.check_integrity()
    assert new.state is RequestState.WAITING
    assert (new.pages, new.num_computed) == ([], 0)
    assert scheduler.waiting[0] is new
    assert old.state is RequestState.RUNNING


def test_a_finished_request_holds_no_pages_and_its_prompt_is_remembered() -> None:
    scheduler = make_scheduler(cached=True, tokens=64)
    request = request_of(40, max_tokens=1)
    scheduler.add(request)
    compute(scheduler, scheduler.schedule())
    assert request.state is RequestState.FINISHED
    assert request.pages == []
    again = request_of(40, max_tokens=1)
    scheduler.add(again)
    (chunk,) = scheduler.schedule()
    assert (chunk.start, chunk.length, again.num_cached) == (32, 8, 32)


def test_finishing_twice_changes_nothing() -> None:
    scheduler = make_scheduler()
    request = request_of(4)
    scheduler.add(request)
    scheduler.schedule()
    scheduler.finish(request, FinishReason.STOP)
    scheduler.finish(request, FinishReason.ABORT)
    assert request.finish_reason is FinishReason.STOP
    scheduler.check_integrity()


@settings(max_examples=60, deadline=None)
@given(
    num_pages=st.integers(4, 24),
    batch=st.integers(1, 6),
    tokens=st.integers(1, 40),
    cached=st.booleans(),
    sizes=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(2, 4)), min_size=1, max_size=8
    ),
    aborts=st.lists(st.integers(0, 40), max_size=3),
)
def test_every_request_ends_once_and_no_page_is_lost(
    num_pages: int,
    batch: int,
    tokens: int,
    cached: bool,
    sizes: list[tuple[int, int, int]],
    aborts: list[int],
) -> None:
    scheduler = make_scheduler(num_pages=num_pages, batch=batch, tokens=tokens, cached=cached)
    requests = [
        request_of(length, max_tokens=max_tokens, first=first)
        for length, max_tokens, first in sizes
        if scheduler.pool.pages_for(length + max_tokens) <= num_pages
    ]
    for request in requests:
        scheduler.add(request)
    steps = 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan or scheduler.num_preemptions
        assert len({chunk.request.id for chunk in plan}) == len(plan)
        for chunk in plan:
            needed = scheduler.pool.pages_for(chunk.start + chunk.length)
            assert len(chunk.request.pages) >= needed
        compute(scheduler, plan)
        if steps in aborts and scheduler.running:
            scheduler.finish(scheduler.running[0], FinishReason.ABORT)
        scheduler.check_integrity()
        steps += 1
        assert steps < 5000, "no progress"
    for request in requests:
        assert request.state is RequestState.FINISHED
        if request.finish_reason is not FinishReason.ABORT:
            assert request.num_output == request.params.max_tokens


def test_a_batch_never_grows_beyond_its_limit() -> None:
    scheduler = make_scheduler(batch=3)
    for _ in range(9):
        scheduler.add(request_of(2))
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert len(scheduler.running) <= 3
        compute(scheduler, plan)


@pytest.mark.parametrize(("length", "expected"), [(16, 1), (17, 2)])
def test_a_prompt_takes_the_pages_it_needs(length: int, expected: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(request_of(length))
    (chunk,) = scheduler.schedule()
    assert len(chunk.request.pages) == expected


def test_urgent_requests_start_first() -> None:
    scheduler = make_scheduler(batch=1)
    requests = [request_of(4, priority=priority) for priority in reversed(Priority)]
    for request in requests:
        scheduler.add(request)
    assert run_dry(scheduler) == requests[::-1]


def test_an_urgent_request_takes_the_seat_of_the_newest_of_the_least_urgent() -> None:
    scheduler = make_scheduler(batch=3, cached=True)
    normal = request_of(20, priority=Priority.NORMAL, first=3)
    bulk = [request_of(20, priority=Priority.BULK, first=first) for first in (5, 7)]
    for request in (normal, *bulk):
        scheduler.add(request)
    for _ in range(3):
        compute(scheduler, scheduler.schedule())
    urgent = request_of(20, priority=Priority.INTERACTIVE, first=11)
    scheduler.add(urgent)
    plan = scheduler.schedule()
    assert urgent in [chunk.request for chunk in plan]
    assert scheduler.waiting == [bulk[1]]
    assert scheduler.running == [urgent, normal, bulk[0]]
    compute(scheduler, plan)
    # What it had computed is found again, and the four get what they asked for.
    run_dry(scheduler)
    assert bulk[1].num_preemptions == 1
    assert [len(r.token_ids) for r in (urgent, normal, *bulk)] == [28] * 4


def test_a_preempted_request_finds_its_own_pages_again() -> None:
    scheduler = make_scheduler(batch=1, cached=True, tokens=64)
    bulk = request_of(40, priority=Priority.BULK)
    scheduler.add(bulk)
    compute(scheduler, scheduler.schedule())
    scheduler.add(request_of(4, priority=Priority.INTERACTIVE, max_tokens=1, first=9))
    compute(scheduler, scheduler.schedule())
    (chunk,) = scheduler.schedule()
    assert (chunk.request, chunk.start, chunk.length) == (bulk, 32, 9)


@pytest.mark.parametrize("priority", list(Priority))
def test_equals_never_interrupt_each_other(priority: Priority) -> None:
    scheduler = make_scheduler(batch=2)
    for _ in range(6):
        scheduler.add(request_of(4, priority=priority))
    run_dry(scheduler)
    assert scheduler.num_preemptions == 0


def test_nobody_is_interrupted_for_one_who_would_not_fit_all_the_same() -> None:
    scheduler = make_scheduler(num_pages=10, batch=8, tokens=200)
    holding = request_of(100, priority=Priority.INTERACTIVE, max_tokens=40)
    bulk = request_of(10, priority=Priority.BULK, max_tokens=4)
    scheduler.add(holding)
    compute(scheduler, scheduler.schedule())
    scheduler.add(bulk)
    compute(scheduler, scheduler.schedule())
    scheduler.add(request_of(60, priority=Priority.INTERACTIVE))
    scheduler.schedule()
    assert bulk.state is RequestState.RUNNING
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(("length", "is_interrupted"), [(180, False), (170, True)])
def test_pages_that_several_share_are_freed_once(length: int, is_interrupted: bool) -> None:
    """20 pages: 8 stay, 5 are free, and three bulk requests hold 4 together and 1 each."""
    scheduler = make_scheduler(num_pages=20, tokens=512, cached=True)
    stays = request_of(120, first=60, priority=Priority.INTERACTIVE)
    scheduler.add(stays)
    compute(scheduler, scheduler.schedule())
    bulk = [request_of(70, priority=Priority.BULK) for _ in range(3)]
    for request in bulk:
        scheduler.add(request)
        compute(scheduler, scheduler.schedule())
    assert scheduler.pool.num_free == 5
    urgent = request_of(length, first=120, priority=Priority.INTERACTIVE)
    scheduler.add(urgent)
    scheduler.schedule()
    scheduler.check_integrity()
    assert (scheduler.num_preemptions > 0) is is_interrupted
    assert (urgent.state is RequestState.RUNNING) is is_interrupted


def test_where_pages_run_out_the_least_urgent_gives_way_even_if_it_is_the_oldest() -> None:
    scheduler = make_scheduler(num_pages=5, tokens=64)
    bulk = request_of(20, priority=Priority.BULK, max_tokens=30)
    urgent = request_of(31, priority=Priority.INTERACTIVE, max_tokens=40)
    for request in (bulk, urgent):
        scheduler.add(request)
        compute(scheduler, scheduler.schedule())
    while not scheduler.num_preemptions:
        compute(scheduler, scheduler.schedule())
    assert (bulk.state, urgent.state) == (RequestState.WAITING, RequestState.RUNNING)
    run_dry(scheduler)
    assert urgent.num_preemptions == 0
    assert bulk.num_output == 30


def test_who_runs_by_age_is_not_interrupted() -> None:
    now_ns = 0
    pool = PagePool(64)
    scheduler = Scheduler(pool, SchedulerLimits(1, 32, aging_ns=100), clock=lambda: now_ns)
    bulk = request_of(4, priority=Priority.BULK)
    bulk.arrived_ns = 0
    scheduler.add(bulk)
    scheduler.add(request_of(4, priority=Priority.INTERACTIVE))
    now_ns = 100
    compute(scheduler, scheduler.schedule())
    assert (bulk.level, scheduler.num_aged) == (Priority.INTERACTIVE, 1)
    run_dry(scheduler)
    assert bulk.num_preemptions == 0


def test_tenants_reuse_their_own_prefixes_and_never_each_other_s() -> None:
    scheduler = make_scheduler(cached=True, tokens=64)
    cached = {}
    for name, tenant in (("first", "a"), ("again", "a"), ("other", "b"), ("other again", "b")):
        request = request_of(40, max_tokens=1, tenant=tenant)
        scheduler.add(request)
        run_dry(scheduler)
        cached[name] = request.num_cached
    assert cached == {"first": 0, "again": 32, "other": 0, "other again": 32}
    assert scheduler.prefix_cache is not None
    assert scheduler.prefix_cache.cross_tenant_hits == 0


def test_an_early_end_is_told_to_the_shares() -> None:
    """Of two tenants that ask for the same, who uses less gets more turns."""
    scheduler = make_scheduler(batch=1, tokens=64)
    for _ in range(12):
        for tenant in "ab":
            scheduler.add(request_of(2, max_tokens=60, tenant=tenant))
    ended = []
    for _ in range(200):
        for chunk in scheduler.schedule():
            compute(scheduler, [chunk])
            request = chunk.request
            if not request.is_finished and (request.tenant == "a" or request.num_output == 59):
                scheduler.finish(request, FinishReason.STOP)
            if request.is_finished:
                ended.append(request.tenant)
    assert ended.count("a") > 3 * ended.count("b")


def test_the_decodes_that_follow_a_plan_are_foreseen_with_their_pages() -> None:
    scheduler = make_scheduler(tokens=40)
    decoding, ending, prompt = request_of(15), request_of(4, max_tokens=2), request_of(60)
    for request in (decoding, ending):
        scheduler.add(request)
    compute(scheduler, scheduler.schedule())
    scheduler.add(prompt)
    plan = scheduler.schedule()
    assert [(c.request, c.start) for c in plan] == [(decoding, 15), (ending, 4), (prompt, 0)]
    foreseen = scheduler.foresee(plan)
    # The one that ends by its length is out, the prompt has tokens left, the other gets a page.
    assert [(c.request, c.start, c.length) for c in foreseen] == [(decoding, 16, 1)]
    assert len(decoding.pages) == 2
    compute(scheduler, plan)
    scheduler.check_integrity()
    plan = scheduler.schedule()
    assert [(c.request, c.start) for c in plan] == [(decoding, 16), (prompt, 38)]
    foreseen = scheduler.foresee(plan)
    assert [(c.request, c.start) for c in foreseen] == [(decoding, 17), (prompt, 60)]
    run_dry(scheduler)
    assert scheduler.pool.num_used == 0


@pytest.mark.parametrize(("num_pages", "is_foreseen"), [(2, False), (3, True)])
def test_pages_are_taken_ahead_only_while_there_is_one_for_everybody(
    num_pages: int, is_foreseen: bool
) -> None:
    scheduler = make_scheduler(num_pages=num_pages)
    request = request_of(16)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert bool(scheduler.foresee(plan)) is is_foreseen
    assert len(request.pages) == 1 + is_foreseen
    assert scheduler.num_preemptions == 0
