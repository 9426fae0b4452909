"""The queue under loads that no machine could serve: a simulated clock, the real scheduler.

A discrete-event simulation: arrivals are drawn from a seed, and a step takes what a two-core CPU
takes for a small model (a fixed part, a part for each decode and one for each prompt token).
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest

from quantgate_serve.admission import Admission, AdmissionLimits, QueueFullError
from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.request import FinishReason, Priority, Request, SamplingParams
from quantgate_serve.scheduler import Chunk, Scheduler, SchedulerLimits
from quantgate_serve.waiting import AGED_PART

INTERACTIVE, NORMAL, BULK = Priority
STEP_NS, DECODE_NS, PROMPT_TOKEN_NS = 3_000_000, 250_000, 100_000
SECOND = 1_000_000_000
DEADLINE_S = 3


# Every prompt is a part of it, and few begin alike.
_TOKENS = [2 + i % 997 for i in range(2 * 997)]


@dataclass(frozen=True)
class Arrival:
    at_ns: int
    priority: Priority = NORMAL
    tenant: str = ""
    num_prompt: int = 40
    max_tokens: int = 20
    deadline_ns: int | None = None  # from the arrival


@dataclass
class Simulation:
    """One server. `outcomes` has exactly one entry for each arrival once it has run dry."""

    window_ns: int = 0
    aging_ns: int = 2 * SECOND
    max_batch_size: int = 32
    num_pages: int = 2048
    now_ns: int = 0
    outcomes: dict[int, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    retries_s: list[int] = field(default_factory=list)
    most_queued_tokens: int = 0

    def __post_init__(self) -> None:
        pool = PagePool(self.num_pages)
        self.scheduler = Scheduler(
            pool,
            SchedulerLimits(
                self.max_batch_size, 512, aging_ns=self.aging_ns, window_ns=self.window_ns
            ),
            prefix_cache=PrefixCache(pool),
            clock=lambda: self.now_ns,
        )
        self.limits = AdmissionLimits(4096, 4096, 1024, 40_000, aging_s=self.aging_ns / SECOND)
        self.admission = Admission(self.limits, clock=lambda: self.now_ns)

    def run(self, arrivals: Iterable[Arrival], *, until_ns: int | None = None) -> None:
        """Feed `arrivals` (in order) and step until all have ended, or until `until_ns`."""
        pending = list(arrivals)[::-1]
        while pending or self.scheduler.has_work:
            if until_ns is not None and self.now_ns >= until_ns:
                return
            while pending and pending[-1].at_ns <= self.now_ns:
                self._arrive(pending.pop())
            for request in self.scheduler.take_expired():
                self._end(request, "expired", FinishReason.ERROR)
            plan = self.scheduler.schedule()
            if plan:
                self._compute(plan)
                continue
            # Held or idle: nothing happens before the next arrival or the end of the window.
            times = [pending[-1].at_ns] if pending else []
            if self.scheduler.has_work:
                times.append(self.scheduler.wake_ns or self.now_ns)
            self.now_ns = max(self.now_ns, min(times, default=self.now_ns))
        self.scheduler.check_integrity()

    def _arrive(self, arrival: Arrival) -> None:
        deadline_ns = arrival.deadline_ns and arrival.at_ns + arrival.deadline_ns
        first = len(self.requests) * 31 % 997
        request = Request(
            _TOKENS[first : first + arrival.num_prompt],
            SamplingParams(max_tokens=arrival.max_tokens),
            priority=arrival.priority,
            tenant=arrival.tenant,
            cache_root=arrival.tenant,
            deadline_ns=deadline_ns,
            arrived_ns=arrival.at_ns,
        )
        self.requests.append(request)
        try:
            self.admission.enter([request])
        except QueueFullError as error:
            self.outcomes[request.id] = error.reason
            self.retries_s.append(error.retry_after_s)
            return
        self.most_queued_tokens = max(self.most_queued_tokens, self.admission.num_tokens)
        self.scheduler.add(request)

    def _compute(self, plan: list[Chunk]) -> None:
        self.batch_sizes.append(len(plan))
        cost_ns = STEP_NS
        for chunk in plan:
            if chunk.request.scheduled_ns == 0:
                chunk.request.scheduled_ns = max(1, self.now_ns)
                self.admission.leave(chunk.request)
            cost_ns += DECODE_NS if chunk.length == 1 else chunk.length * PROMPT_TOKEN_NS
        self.now_ns += cost_ns
        for chunk in plan:
            request, is_last = chunk.request, chunk.is_last
            self.scheduler.commit(chunk)
            if is_last:
                request.token_ids.append(5)
                if request.num_output == request.params.max_tokens:
                    self._end(request, "served", FinishReason.LENGTH)
        self.admission.tokens_per_s = self.scheduler.rate.tokens_per_s
        self.admission.s_per_step = self.scheduler.rate.s_per_step

    def _end(self, request: Request, outcome: str, reason: FinishReason) -> None:
        assert request.id not in self.outcomes, "answered twice"
        self.outcomes[request.id] = outcome
        self.scheduler.finish(request, reason)
        request.finished_ns = self.now_ns
        if request.scheduled_ns == 0:
            self.admission.leave(request)

    def admitted(self, priority: Priority) -> list[Request]:
        refused = {"queued_requests", "queued_tokens", "tenant_share", "deadline"}
        return [
            request
            for request in self.requests
            if request.priority is priority and self.outcomes.get(request.id) not in refused
        ]

    def wait_s(self, request: Request) -> float:
        """From arrival to the first step, or to the end of one that never had any."""
        return ((request.scheduled_ns or request.finished_ns) - request.arrived_ns) / SECOND


def poisson(
    rate_per_s: float, seconds: float, *, seed: int, mix: list[tuple[float, Priority, str]]
) -> list[Arrival]:
    """Arrivals at random, each of a class and tenant drawn by weight; sizes as in workload A."""
    source = random.Random(seed)
    at_s, arrivals = 0.0, []
    weights = [weight for weight, _, _ in mix]
    while (at_s := at_s + source.expovariate(rate_per_s)) < seconds:
        _, priority, tenant = source.choices(mix, weights)[0]
        arrivals.append(
            Arrival(
                int(at_s * SECOND),
                priority,
                tenant,
                num_prompt=source.randint(20, 200),
                max_tokens=source.randint(8, 64),
                deadline_ns=DEADLINE_S * SECOND if priority is INTERACTIVE else None,
            )
        )
    return arrivals


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


# What the simulated machine serves of workload A, measured below.
CAPACITY_PER_S = 49.0


def test_the_simulated_machine_has_the_stated_capacity() -> None:
    simulation = Simulation()
    simulation.run(poisson(100, 20, seed=1, mix=[(1, NORMAL, "")]), until_ns=20 * SECOND)
    served = Counter(simulation.outcomes.values())["served"]
    assert served / 20 == pytest.approx(CAPACITY_PER_S, rel=0.1)


MIX = [(4.0, INTERACTIVE, "a"), (1.0, INTERACTIVE, "b"), (2.0, NORMAL, "a"), (3.0, BULK, "c")]


@pytest.mark.parametrize(
    ("seconds", "seed"),
    [(20, 1), (20, 2), pytest.param(300, 3, marks=pytest.mark.slow)],
)
def test_ten_times_overload_keeps_admitted_interactive_requests_within_their_deadline(
    seconds: float, seed: int
) -> None:
    simulation = Simulation()
    simulation.run(poisson(10 * CAPACITY_PER_S, seconds, seed=seed, mix=MIX))
    # Every request was answered, and (see _end) once.
    assert simulation.outcomes.keys() == {request.id for request in simulation.requests}
    interactive = simulation.admitted(INTERACTIVE)
    waits = [simulation.wait_s(request) for request in interactive]
    assert percentile(waits, 95) <= DEADLINE_S
    outcomes = Counter(simulation.outcomes[request.id] for request in interactive)
    # A queue that admits only what must expire in it would pass the line above.
    assert outcomes["served"] >= 0.95 * len(interactive)
    assert len(interactive) >= 0.5 * CAPACITY_PER_S * seconds
    for priority in (NORMAL, BULK):
        assert all(simulation.outcomes[r.id] == "served" for r in simulation.admitted(priority))


# Four and two times what a full batch takes for a request; the longest answers take twice that.
@pytest.mark.parametrize("deadline_s", [3.7, 1.9])
def test_long_answers_are_not_let_in_to_run_out_of_time_while_running(deadline_s: float) -> None:
    simulation = Simulation(max_batch_size=64, num_pages=64 * 33)
    mix = [(5.0, INTERACTIVE, ""), (2.0, NORMAL, ""), (3.0, BULK, "")]
    arrivals = [
        replace(one, deadline_ns=one.deadline_ns and int(deadline_s * SECOND))
        for one in poisson(10 * CAPACITY_PER_S, 15, seed=1, mix=mix)
    ]
    simulation.run(arrivals)
    interactive = simulation.admitted(INTERACTIVE)
    outcomes = Counter(simulation.outcomes[request.id] for request in interactive)
    assert outcomes["served"] >= 0.95 * len(interactive)
    assert outcomes["served"] >= 0.6 * CAPACITY_PER_S * 15
    assert any(request.params.max_tokens > 56 for request in interactive)


def test_the_queue_never_grows_beyond_its_limit() -> None:
    simulation = Simulation()
    simulation.run(poisson(10 * CAPACITY_PER_S, 20, seed=4, mix=[(1, NORMAL, "")]))
    limit = simulation.limits.max_queued_tokens
    assert 0.5 * limit < simulation.most_queued_tokens <= limit
    assert Counter(simulation.outcomes.values())["queued_tokens"] > 0


def test_retry_after_tells_when_there_will_be_room() -> None:
    """Refused as the queue is full, a client that comes back when told is let in."""
    simulation = Simulation()
    flood = poisson(10 * CAPACITY_PER_S, 20, seed=5, mix=[(1, NORMAL, "")])
    simulation.run(flood, until_ns=20 * SECOND)
    requests = [Request([2] * 100, SamplingParams(max_tokens=2900)) for _ in range(5)]
    with pytest.raises(QueueFullError) as refused:
        simulation.admission.enter(requests)
    assert 1 < refused.value.retry_after_s < 60
    start_ns = simulation.now_ns
    while True:
        simulation.run([], until_ns=simulation.now_ns + 1)
        try:
            simulation.admission.enter(requests)
            break
        except QueueFullError:
            pass
    waited_s = (simulation.now_ns - start_ns) / SECOND
    assert refused.value.retry_after_s == pytest.approx(waited_s, rel=0.3, abs=1)


@pytest.mark.parametrize("priority", [NORMAL, BULK])
def test_starvation_is_bounded_under_sustained_interactive_overload(priority: Priority) -> None:
    """aging_s + AGED_PART * (D + 2 * largest) / R, the formula of docs/serving.md."""
    simulation = Simulation()
    overload = poisson(10 * CAPACITY_PER_S, 20, seed=6, mix=[(1, INTERACTIVE, "")])
    probes = [Arrival((5 + i) * SECOND // 2, priority, "", 150, 50) for i in range(10)]
    simulation.run(sorted(overload + probes, key=lambda arrival: arrival.at_ns))
    rate = simulation.admission.tokens_per_s
    assert rate is not None
    waits = [simulation.wait_s(request) for request in simulation.admitted(priority)]
    assert len(waits) == 10
    # All have begun while the overload went on.
    assert max(r.scheduled_ns for r in simulation.admitted(priority)) < overload[-1].at_ns
    # All ten arrive within five seconds, so that the last finds at most the other nine.
    bound_s = simulation.aging_ns / SECOND + AGED_PART * (9 * 200 + 2 * 264) / rate
    assert simulation.aging_ns / SECOND <= min(waits)
    assert max(waits) <= bound_s + 0.5  # and a batch in service when its turn comes
    assert simulation.scheduler.num_aged >= 10


@pytest.mark.parametrize("priority", list(Priority))
def test_a_tenant_s_flood_does_not_delay_another_s_single_requests(priority: Priority) -> None:
    flood = poisson(10 * CAPACITY_PER_S, 15, seed=7, mix=[(1, priority, "flood")])
    singles = [Arrival(i * SECOND, priority, "single", 100, 20) for i in range(5, 15)]
    simulation = Simulation()
    simulation.run(sorted(flood + singles, key=lambda arrival: arrival.at_ns))
    mine = [request for request in simulation.requests if request.tenant == "single"]
    assert {simulation.outcomes[request.id] for request in mine} == {"served"}
    # One turn of the other tenant, and the next seat that becomes free.
    assert max(simulation.wait_s(request) for request in mine) < 0.2
    others = [request for request in simulation.admitted(priority) if request not in mine]
    assert percentile([simulation.wait_s(request) for request in others], 50) > 1.0


WINDOW_NS = 20_000_000


def test_a_window_gathers_a_burst_and_delays_nobody_longer() -> None:
    arrivals = [Arrival(burst * SECOND + i * 2_000_000) for burst in range(5) for i in range(6)]
    held, free = Simulation(window_ns=WINDOW_NS), Simulation()
    held.run(arrivals)
    free.run(arrivals)
    assert held.batch_sizes[0] == 6
    assert free.batch_sizes[0] == 1
    assert len(held.batch_sizes) < len(free.batch_sizes)
    assert max(held.wait_s(request) for request in held.requests) <= WINDOW_NS / SECOND
    waits = held.scheduler.window_waits
    assert len(waits) == 30
    assert max(waits) <= WINDOW_NS / SECOND


def test_a_window_ends_early_once_the_batch_is_filled() -> None:
    simulation = Simulation(window_ns=WINDOW_NS)
    simulation.run([Arrival(i * 1_000_000) for i in range(8)])
    assert simulation.batch_sizes[0] == 8
    assert simulation.wait_s(simulation.requests[0]) == pytest.approx(0.007)


def test_a_filled_engine_holds_nobody() -> None:
    simulation = Simulation(window_ns=WINDOW_NS)
    simulation.run([Arrival(0, max_tokens=200) for _ in range(8)] + [Arrival(50_000_000)])
    # The wait is the rest of a step, in which eight others were decoded.
    assert simulation.wait_s(simulation.requests[-1]) <= 0.006
    assert simulation.scheduler.window_waits == []


def test_a_deadline_inside_the_window_wakes_the_engine() -> None:
    simulation = Simulation(window_ns=WINDOW_NS)
    simulation.run([Arrival(0, deadline_ns=5_000_000)])
    (request,) = simulation.requests
    assert simulation.outcomes == {request.id: "expired"}
    assert simulation.wait_s(request) == pytest.approx(0.005)


def test_deadlines_end_requests_that_run_too_and_free_their_pages() -> None:
    simulation = Simulation()
    simulation.run([Arrival(0, max_tokens=400, deadline_ns=SECOND // 10)])
    (request,) = simulation.requests
    assert simulation.outcomes == {request.id: "expired"}
    assert 1 < request.num_output < 400
    assert simulation.scheduler.pool.num_used == simulation.scheduler.pool.num_cached
