"""Scheduler, page pool and prefix cache together, under everything that can happen to them."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.page_tables import PageTables
from quantgate_serve.request import FinishReason, Priority, Request, RequestState, SamplingParams
from quantgate_serve.scheduler import Chunk, Scheduler, SchedulerLimits

PAGE_SIZE = 4
Slot = tuple[str, tuple[int, ...]]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are aborted, expire and fail, while a model of the KV storage watches.

    What a slot holds depends on all tokens up to it and on whose they are. Each chunk reads the
    slots before it and must find its own request's there; it writes its own slots, which nobody
    else may be reading, unless they hold just that already.
    """

    @initialize(
        num_pages=st.integers(6, 20),
        batch=st.integers(1, 5),
        tokens=st.integers(1, 24),
        budget=st.integers(1, 20),
        window_ns=st.sampled_from([0, 50]),
        cached=st.booleans(),
    )
    def make(
        self, num_pages: int, batch: int, tokens: int, budget: int, window_ns: int, cached: bool
    ) -> None:
        self.now_ns = 1
        self.pool = PagePool(num_pages, page_size=PAGE_SIZE)
        self.cache = PrefixCache(self.pool, max_pages=budget) if cached else None
        self.scheduler = Scheduler(
            self.pool,
            SchedulerLimits(batch, tokens, aging_ns=100, window_ns=window_ns, window_fill=3),
            prefix_cache=self.cache,
            clock=lambda: self.now_ns,
        )
        self.slots: dict[int, Slot] = {}
        self.requests: list[Request] = []
        self.ended: dict[int, FinishReason] = {}
        # Two rows to begin with, so that they change hands.
        self.tables = PageTables(width=num_pages, null_page=num_pages, num_rows=2)
        self.foreseen: list[Chunk] = []
        self.interrupted: dict[int, int] = {}

    @rule(
        length=st.integers(1, 20),
        max_tokens=st.integers(1, 12),
        letter=st.integers(0, 2),
        tenant=st.sampled_from("ab"),
        priority=st.sampled_from(list(Priority)),
        life_ns=st.none() | st.integers(0, 200),
        wants_logprobs=st.booleans(),
    )
    def submit(
        self,
        length: int,
        max_tokens: int,
        letter: int,
        tenant: str,
        priority: Priority,
        life_ns: int | None,
        wants_logprobs: bool,
    ) -> None:
        if self.pool.pages_for(length + max_tokens) > self.pool.num_pages:
            return
        request = Request(
            [letter] * length,
            SamplingParams(max_tokens=max_tokens, prompt_logprobs=wants_logprobs),
            tenant=tenant,
            cache_root=tenant,
            priority=priority,
            arrived_ns=self.now_ns,
            deadline_ns=None if life_ns is None else self.now_ns + life_ns,
        )
        self.requests.append(request)
        self.scheduler.add(request)

    @rule(pause_ns=st.integers(1, 60))
    def wait(self, pause_ns: int) -> None:
        self.now_ns += pause_ns

    @rule(
        fails=st.lists(st.booleans(), max_size=5),
        stops=st.lists(st.booleans(), max_size=5),
        foresees=st.booleans(),
    )
    def step(self, fails: list[bool], stops: list[bool], foresees: bool) -> None:
        for request in self.scheduler.take_expired():
            assert request.deadline_ns is not None
            assert request.deadline_ns <= self.now_ns
            self.end(request, FinishReason.ERROR)
        plan = self.scheduler.schedule()
        limits = self.scheduler.limits
        assert sum(chunk.length for chunk in plan) <= limits.max_batched_tokens
        assert self.scheduler.num_running <= limits.max_batch_size
        assert len({chunk.request.id for chunk in plan}) == len(plan)
        self.compare_with_foreseen(plan)
        rows = self.tables.rows_of([chunk.request for chunk in plan])
        for row, chunk in zip(rows, plan, strict=True):
            pages = chunk.request.pages
            assert self.tables.pages[row, : len(pages)].tolist() == pages
        self.foreseen = self.scheduler.foresee(plan) if foresees else []
        self.interrupted = {c.request.id: c.request.num_preemptions for c in self.foreseen}
        for chunk in self.foreseen:
            assert chunk.start < len(chunk.request.pages) * PAGE_SIZE
        for index, chunk in enumerate(plan):
            self.compute(chunk)
            if index < len(fails) and fails[index]:
                self.end(chunk.request, FinishReason.ERROR)
                continue
            is_last = chunk.is_last
            self.scheduler.commit(chunk)
            if is_last:
                request = chunk.request
                request.token_ids.append(request.num_output % 2)
                if request.num_output >= request.params.max_tokens:
                    self.end(request, FinishReason.LENGTH)
                elif index < len(stops) and stops[index]:
                    self.end(request, FinishReason.STOP)
        if not plan and self.scheduler.has_work:
            assert self.scheduler.wake_ns is not None or self.scheduler.num_preemptions
        self.now_ns += 7

    def compare_with_foreseen(self, plan: list[Chunk]) -> None:
        """Who was foreseen and still runs with the same pages decodes where it was foreseen to."""
        planned = {chunk.request.id: chunk for chunk in plan}
        for chunk in self.foreseen:
            request = chunk.request
            found = planned.get(request.id)
            if found is not None and request.num_preemptions == self.interrupted[request.id]:
                assert (found.start, found.length) == (chunk.start, 1)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = [request for request in self.requests if not request.is_finished]
        if alive:
            self.end(data.draw(st.sampled_from(alive)), FinishReason.ABORT)

    def compute(self, chunk: Chunk) -> None:
        request = chunk.request
        assert request.state is RequestState.RUNNING
        assert chunk.length > 0
        for at in range(chunk.start + chunk.length):
            page = request.pages[at // PAGE_SIZE]
            slot = page * PAGE_SIZE + at % PAGE_SIZE
            content = (request.tenant, tuple(request.token_ids[: at + 1]))
            if at < chunk.start:
                assert self.slots[slot] == content, "reads what somebody else wrote"
                continue
            if self.slots.get(slot) != content:
                readers = [r for r in self.scheduler.running if page in r.pages]
                assert readers == [request], "writes into a page that is shared"
                self.slots[slot] = content

    def end(self, request: Request, reason: FinishReason) -> None:
        assert request.id not in self.ended, "answered twice"
        self.ended[request.id] = reason
        self.scheduler.finish(request, reason)
        self.scheduler.finish(request, FinishReason.ABORT)  # changes nothing
        assert request.finish_reason is reason

    @invariant()
    def books_match(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        running, waiting = self.scheduler.running, self.scheduler.waiting
        alive = {request.id for request in self.requests if request.id not in self.ended}
        assert sorted(request.id for request in running + waiting) == sorted(alive)
        assert len(waiting) == self.scheduler.num_waiting
        assert all(not request.pages for request in waiting)
        if self.cache is not None:
            assert self.cache.cross_tenant_hits == 0
        for level in Priority:
            seats = [request.seat for request in running if request.level is level]
            assert seats == sorted(seats)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        steps = 0
        while self.scheduler.has_work:
            self.step([], [], steps % 2 == 0)
            self.books_match()
            steps += 1
            assert steps < 3000, "no progress"
        assert self.ended.keys() == {request.id for request in self.requests}
        for request in self.requests:
            if self.ended[request.id] is FinishReason.LENGTH:
                assert request.num_output == request.params.max_tokens
        assert self.pool.num_used == self.pool.num_cached


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
