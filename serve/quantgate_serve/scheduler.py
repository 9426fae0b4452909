"""Which tokens of which requests the next step computes.

Decode first, then chunks of prompts under a token budget, then new requests while pages last.
Where seats or pages run out, the least urgent class gives way, its newest request first; what it
loses is computed again later, in its old place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

from quantgate_serve.deadlines import Deadlines
from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.request import FinishReason, Priority, Request, RequestState
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
        # How long each request that the window held was held, in seconds; the engine empties it.
        self.window_waits: list[float] = []
        self.rate = ServiceRate()
        self._clock = clock
        self._waiting = WaitingRequests(aging_ns=limits.aging_ns)
        # By class, each in order of `seat`: the last of the last class is the first to give way.
        self._running: dict[Priority, dict[int, Request]] = {priority: {} for priority in Priority}
        self._deadlines = Deadlines()
        self._num_seated = 0
        self._served_tokens = 0
        self._held_since_ns: int | None = None
        # When the last step was chosen, if requests were left waiting for room then.
        self._blocked_ns: int | None = None

    @property
    def num_running(self) -> int:
        return sum(map(len, self._running.values()))

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
        return bool(self._waiting) or any(self._running.values())

    @property
    def running(self) -> list[Request]:
        """The most urgent class first, each in the order in which they started."""
        return [request for level in self._running.values() for request in level.values()]

    @property
    def waiting(self) -> list[Request]:
        """By class; inside a class in order of arrival, not of turns."""
        return self._waiting.requests

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
                request.pages += self.pool.allocate(1)
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
        if self.prefix_cache is not None and chunk.start < len(request.prompt_ids) <= end:
            self._remember(request, request.prompt_ids)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request in any state and give its pages back."""
        if request.is_finished:
            return
        if request.state is RequestState.RUNNING:
            del self._running[request.level][request.id]
            if reason is not FinishReason.ERROR:
                self._remember(request, request.token_ids[: request.num_computed])
            self._release(request)
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
        holders: list[list[int]] = [request.pages for request in self.running]
        holders += [request.pages for request in self.waiting]
        if self.prefix_cache is not None:
            holders.append(list(self.prefix_cache.pages()))
            self.prefix_cache.check_integrity()
        self.pool.check_integrity(holders)

    def _observe_rate(self, now_ns: int) -> None:
        served, self._served_tokens = self._served_tokens, 0
        if self._blocked_ns is not None:
            self.rate.observe(served, (now_ns - self._blocked_ns) / 1e9)
            self._blocked_ns = None

    def _is_held(self, now_ns: int) -> bool:
        """Whether those that wait are kept for company a little longer."""
        limits = self.limits
        oldest_ns = None
        if (
            limits.window_ns > 0
            and self._waiting
            and len(self._waiting) + self.num_running < limits.window_fill
            and not self._waiting.has_returning
        ):
            oldest_ns = self._waiting.oldest_ns
        if oldest_ns is None or now_ns >= oldest_ns + limits.window_ns:
            if self._held_since_ns is not None:
                self._end_hold(now_ns)
            return False
        if self._held_since_ns is None:
            self._held_since_ns = now_ns
        self.wake_ns = oldest_ns + limits.window_ns
        deadline_ns = self._deadlines.next_ns
        if deadline_ns is not None:
            self.wake_ns = min(self.wake_ns, deadline_ns)
        return True

    def _end_hold(self, now_ns: int) -> None:
        if self._held_since_ns is None:
            return
        since_ns, self._held_since_ns = self._held_since_ns, None
        self.window_waits += [
            (now_ns - max(since_ns, request.arrived_ns)) / 1e9 for request in self._waiting.requests
        ]

    def _plan_running(self) -> tuple[list[Chunk], int]:
        """Chunks of the running requests, and what they leave of the token budget."""
        budget = self.limits.max_batched_tokens
        page_size = self.pool.page_size
        running = RequestState.RUNNING
        plan: list[Chunk] = []
        prefilling: list[Request] = []
        for request in self.running:
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
        while not self._ensure_free(1):
            victim = self._last_running() or request
            self._preempt(victim)
            if victim is request:
                return False
        request.pages += self.pool.allocate(1)
        return True

    def _seat_urgent(self, now_ns: int) -> None:
        """Start requests for which less urgent ones have to give way."""
        tokens = 0
        while tokens < self.limits.max_batched_tokens:
            turn = self._waiting.turn(now_ns)
            last = self._last_running()
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
        pages = self.pool.num_free + self.pool.num_cached
        staying = 0
        for level, requests in self._running.items():
            if level > request.priority:
                pages += sum(len(other.pages) for other in requests.values())
            else:
                staying += len(requests)
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
        if self.num_running >= self.limits.max_batch_size or not self._reserve(request):
            return False
        self._waiting.take(turn)
        if turn.is_aged:
            # Else the next urgent request would interrupt it, and it would never end.
            request.level = Priority.INTERACTIVE
        request.state = RequestState.RUNNING
        level = self._running[request.level]
        level[request.id] = request
        if request.seat < 0:
            request.seat = self._num_seated
            self._num_seated += 1
        else:
            ordered = sorted(level.values(), key=lambda other: other.seat)
            self._running[request.level] = {other.id: other for other in ordered}
        return True

    def _reserve(self, request: Request) -> bool:
        """Pages for all tokens so far, reusing known prefixes; False when they do not fit now."""
        cached: list[int] = []
        # A reused page has no logits, so a request that wants its prompt's starts from nothing.
        if self.prefix_cache is not None and not request.params.reads_whole_prompt:
            cached = self.prefix_cache.match(
                request.token_ids, root=request.cache_root, owner=request.tenant
            )
        count = self.pool.pages_for(len(request.token_ids)) - len(cached)
        # Head room of a page for each running request, or admission would only cause preemption.
        if not self._ensure_free(count + self.num_running):
            self._give_back(cached)
            return False
        request.pages = cached + self.pool.allocate(count)
        request.num_computed = len(cached) * self.pool.page_size
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
        return True

    def _ensure_free(self, count: int) -> bool:
        missing = count - self.pool.num_free
        if missing > 0 and self.prefix_cache is not None:
            self.prefix_cache.evict(missing)
        return self.pool.num_free >= count

    def _last_running(self) -> Request | None:
        """The newest of the least urgent class that runs."""
        for level in reversed(self._running.values()):
            if level:
                return next(reversed(level.values()))
        return None

    def _preempt(self, request: Request) -> None:
        del self._running[request.level][request.id]
        # What is not needed for others at once is found again when it continues.
        self._remember(request, request.token_ids[: request.num_computed])
        self._release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self._waiting.put_back(request)
        self.num_preemptions += 1

    def _remember(self, request: Request, tokens: list[int]) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.insert(
                tokens, request.pages, root=request.cache_root, owner=request.tenant
            )

    def _release(self, request: Request) -> None:
        self._give_back(request.pages)
        request.pages = []

    def _give_back(self, pages: list[int]) -> None:
        if self.prefix_cache is None:
            self.pool.release(pages)
        else:
            self.prefix_cache.release(pages)
