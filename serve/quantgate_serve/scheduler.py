"""Which tokens of which requests the next step computes.

Decode first, then chunks of prompts under a token budget, then new requests while pages last.
Where seats or pages run out, the least urgent class gives way, its newest request first; what it
loses is computed again later, in its old place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

from quantgate_serve.admission_window import AdmissionWindow
from quantgate_serve.deadlines import Deadlines
from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.request import FinishReason, Priority, Request, RequestState
from quantgate_serve.request_pages import RequestPages
from quantgate_serve.running import RunningRequests
from quantgate_serve.service_rate import ServiceRate
from quantgate_serve.waiting import Turn, WaitingRequests


@dataclass(slots=True)
class Chunk:
    """Tokens `start` to `start + length` of a request, to be computed in one step."""

    request: Request
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        """Whether the request's next token follows from this chunk."""
        return self.start + self.length == len(self.request.token_ids)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much is computed at once, and how long requests may be made to wait for it.

    A request that finds fewer than `window_fill` running and waiting may be held for `window_ns`
    after its arrival, so that others can join its first step. See `waiting.py` for `aging_ns`.
    """

    max_batch_size: int
    max_batched_tokens: int
    aging_ns: int = 5_000_000_000
    window_ns: int = 0
    window_fill: int = 8


class Scheduler:
    """Owns the queue, the running requests and every request's pages. One thread uses it."""

    def __init__(
        self,
        pool: PagePool,
        limits: SchedulerLimits,
        *,
        prefix_cache: PrefixCache | None = None,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.prefix_cache = prefix_cache
        self.num_preemptions = 0
        # Set by a schedule() that held requests back though nothing runs: nothing changes before
        # then, unless a request is added.
        self.wake_ns: int | None = None
        self.rate = ServiceRate()
        self._clock = clock
        self._waiting = WaitingRequests(aging_ns=limits.aging_ns)
        self._running = RunningRequests()
        self._pages = RequestPages(pool, prefix_cache)
        self._window = AdmissionWindow(window_ns=limits.window_ns, fill=limits.window_fill)
        self._deadlines = Deadlines()
        self._served_tokens = 0
        # When the last step was chosen, if requests were left waiting for room then.
        self._blocked_ns: int | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_aged(self) -> int:
        """Requests that started before more urgent ones because their class was overdue."""
        return self._waiting.num_aged

    @property
    def oldest_waiting_ns(self) -> int | None:
        """When the request that waits longest arrived; None when nobody waits."""
        return self._waiting.oldest_ns

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or bool(self._running)

    @property
    def running(self) -> list[Request]:
        """The most urgent class first, each in the order in which they first started."""
        return self._running.requests

    @property
    def waiting(self) -> list[Request]:
        """By class; inside a class in order of arrival, not of turns."""
        return self._waiting.requests

    @property
    def window_waits(self) -> list[float]:
        """How long the window held each request that it held, in seconds; the engine empties it."""
        return self._window.waits

    def count_waiting(self, priority: Priority) -> int:
        return self._waiting.count(priority)

    def add(self, request: Request) -> None:
        self._waiting.push(request)
        self._deadlines.add(request)
        self.wake_ns = None

    def take_expired(self) -> list[Request]:
        """Requests past their deadline, each told once; the caller finishes them."""
        return self._deadlines.take_expired(self._clock())

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks, decodes first; takes pages and may preempt.

        Nothing to compute though there is work means that requests are held until `wake_ns`, or,
        where that is None, that pages were just taken back: call again.
        """
        now_ns = self._clock()
        self.wake_ns = None
        self._observe_rate(now_ns)
        if self._is_held(now_ns):
            plan, _ = self._plan_running()
            if plan:
                self.wake_ns = None
            return plan
        self._seat_urgent(now_ns)
        preemptions = self.num_preemptions
        plan, budget = self._plan_running()
        if self.num_preemptions == preemptions:
            self._seat_waiting(plan, budget, now_ns)
        self._blocked_ns = now_ns if self._waiting else None
        return plan

    def foresee(self, plan: Sequence[Chunk]) -> list[Chunk]:
        """The decodes that follow `plan`, which is being computed, unless a request ends early.

        The pages that they will need are taken now, while there is one for every running request
        besides; else nothing is foreseen.
        """
        found = []
        for chunk in plan:
            request = chunk.request
            start = chunk.start + chunk.length
            if not chunk.is_last or request.num_output + 1 >= request.params.max_tokens:
                continue
            if start >= len(request.pages) * self.pool.page_size:
                if self.pool.num_free <= self.num_running:
                    return []
                self._pages.grow(request)
            found.append(Chunk(request, start, 1))
        return found

    def commit(self, chunk: Chunk) -> None:
        """The chunk was computed: its keys and values are in the cache."""
        request = chunk.request
        end = chunk.start + chunk.length
        request.num_computed = end
        if end > request.num_served:
            self._served_tokens += end - request.num_served
            request.num_served = end
        if chunk.start < len(request.prompt_ids) <= end:
            self._pages.remember(request, request.prompt_ids)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request in any state and give its pages back."""
        if request.is_finished:
            return
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            if reason is not FinishReason.ERROR:
                self._pages.remember(request, request.token_ids[: request.num_computed])
            self._pages.release(request)
        else:
            self._waiting.discard(request)
        if request.seat >= 0:
            left = request.cost - request.num_served
            self._waiting.refund(request, left)
            if reason is FinishReason.STOP:
                # It asked for more than it needed, as others like it will.
                self._served_tokens += left
            if request.scheduled_ns and reason in (FinishReason.STOP, FinishReason.LENGTH):
                seconds = (self._clock() - request.scheduled_ns) / 1e9
                prompt = math.ceil(request.num_prompt / self.limits.max_batched_tokens)
                self.rate.observe_end(prompt + request.num_output, seconds)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def check_integrity(self) -> None:
        """Raise PageIntegrityError unless every page is accounted for."""
        self._pages.check_integrity([*self.running, *self.waiting])

    def _observe_rate(self, now_ns: int) -> None:
        served, self._served_tokens = self._served_tokens, 0
        if self._blocked_ns is not None:
            self.rate.observe(served, (now_ns - self._blocked_ns) / 1e9)
            self._blocked_ns = None

    def _is_held(self, now_ns: int) -> bool:
        """Whether those that wait are kept for company a little longer."""
        until_ns = self._window.held_until_ns(self._waiting, now_ns, num_running=len(self._running))
        if until_ns is None:
            return False
        deadline_ns = self._deadlines.next_ns
        self.wake_ns = until_ns if deadline_ns is None else min(until_ns, deadline_ns)
        return True

    def _plan_running(self) -> tuple[list[Chunk], int]:
        """Chunks of the running requests, and what they leave of the token budget."""
        budget = self.limits.max_batched_tokens
        page_size = self.pool.page_size
        running = RequestState.RUNNING
        plan: list[Chunk] = []
        prefilling: list[Request] = []
        for request in self._running.requests:
            start = request.num_computed
            # A victim comes last in this order, so it is never planned already.
            if request.state is not running:
                continue
            if len(request.token_ids) - start != 1:
                prefilling.append(request)
            elif budget > 0 and (
                start < len(request.pages) * page_size or self._take_page(request)
            ):
                plan.append(Chunk(request, start, 1))
                budget -= 1
        for request in prefilling:
            if budget <= 0:
                break
            if request.state is running:
                length = min(request.num_uncomputed, budget)
                plan.append(Chunk(request, request.num_computed, length))
                budget -= length
        return plan, budget

    def _take_page(self, request: Request) -> bool:
        """One more page for `request`; False when it had to give up its own."""
        while not self._pages.grow(request):
            victim = self._running.last or request
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _seat_urgent(self, now_ns: int) -> None:
        """Start requests for which less urgent ones have to give way."""
        tokens = 0
        while tokens < self.limits.max_batched_tokens:
            turn = self._waiting.turn(now_ns)
            last = self._running.last
            # An aged turn is a share of what is given away, no right to interrupt.
            if turn is None or last is None or turn.is_aged:
                return
            request = turn.request
            if last.level <= request.priority:
                return
            if self._seat(turn):
                tokens += request.num_uncomputed
            elif self._would_fit_without(request):
                self._preempt(last)
            else:
                return

    def _would_fit_without(self, request: Request) -> bool:
        """Whether `request` would find room if nothing less urgent ran."""
        leaving = self._running.less_urgent(request.priority)
        staying = len(self._running) - len(leaving)
        freed = self.pool.count_freed(other.pages for other in leaving)
        pages = self.pool.num_free + self.pool.num_cached + freed
        needed = self.pool.pages_for(len(request.token_ids)) + staying
        return staying < self.limits.max_batch_size and needed <= pages

    def _seat_waiting(self, plan: list[Chunk], budget: int, now_ns: int) -> None:
        """Start requests in their turn, while seats, pages and the token budget last."""
        while budget > 0 and self._waiting:
            turn = self._waiting.turn(now_ns)
            if turn is None or not self._seat(turn):
                return
            request = turn.request
            length = min(request.num_uncomputed, budget)
            plan.append(Chunk(request, request.num_computed, length))
            budget -= length

    def _seat(self, turn: Turn) -> bool:
        """Start the request whose turn it is; False when it finds no seat or no pages now."""
        request = turn.request
        num_running = len(self._running)
        # Head room of a page for each running request, or admission would only cause preemption.
        if num_running >= self.limits.max_batch_size or not self._pages.reserve(
            request, head_room=num_running
        ):
            return False
        self._waiting.take(turn)
        if turn.is_aged:
            # Else the next urgent request would interrupt it, and it would never end.
            request.level = Priority.INTERACTIVE
        request.state = RequestState.RUNNING
        self._running.seat(request)
        return True

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        # What is not needed for others at once is found again when it continues.
        self._pages.remember(request, request.token_ids[: request.num_computed])
        self._pages.release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self._waiting.put_back(request)
        self.num_preemptions += 1
