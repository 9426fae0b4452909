"""Which tokens of which requests the next step computes.

Decode first, then chunks of prompts under a token budget, then new requests while pages last.
A request that finds no page takes those of the newest one, which is computed again later.
"""

from collections import deque
from dataclasses import dataclass

from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.request import FinishReason, Request, RequestState


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + length` of a request, to be computed in one step."""

    request: Request
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        """Whether the request's next token follows from this chunk."""
        return self.start + self.length == len(self.request.token_ids)


class Scheduler:
    """Owns the queue, the running list and every request's pages. One thread uses it."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_batch_size: int,
        max_batched_tokens: int,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.max_batch_size = max_batch_size
        self.max_batched_tokens = max_batched_tokens
        self.waiting: deque[Request] = deque()
        # In order of admission: the last one is the first to give up its pages.
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks, decodes first; takes pages and may preempt."""
        preemptions = self.num_preemptions
        budget = self.max_batched_tokens
        plan: list[Chunk] = []
        planned: set[int] = set()
        decoding = [request for request in self.running if request.num_uncomputed == 1]
        prefilling = [request for request in self.running if request.num_uncomputed > 1]
        for request in decoding + prefilling:
            if budget <= 0:
                break
            if request.state is not RequestState.RUNNING:
                continue  # preempted a moment ago by an older one
            length = min(request.num_uncomputed, budget)
            if self._take_pages(request, request.num_computed + length, planned):
                plan.append(Chunk(request, request.num_computed, length))
                planned.add(request.id)
                budget -= length
        if self.num_preemptions == preemptions:
            self._admit(plan, budget)
        return plan

    def commit(self, chunk: Chunk) -> None:
        """The chunk was computed: its keys and values are in the cache."""
        request = chunk.request
        request.num_computed = chunk.start + chunk.length
        if (
            self.prefix_cache is not None
            and chunk.start < request.num_prompt <= request.num_computed
        ):
            self.prefix_cache.insert(request.prompt_ids, request.pages, root=request.cache_root)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request in any state and give its pages back."""
        if request.is_finished:
            return
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            if self.prefix_cache is not None and reason is not FinishReason.ERROR:
                computed = request.token_ids[: request.num_computed]
                self.prefix_cache.insert(computed, request.pages, root=request.cache_root)
        else:
            self.waiting.remove(request)
        self._free_pages(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def check_integrity(self) -> None:
        """Raise PageIntegrityError unless every page is accounted for."""
        holders: list[list[int]] = [request.pages for request in self.running]
        holders += [request.pages for request in self.waiting]
        if self.prefix_cache is not None:
            holders.append(list(self.prefix_cache.pages()))
        self.pool.check_integrity(holders)

    def _admit(self, plan: list[Chunk], budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_batch_size:
            request = self.waiting[0]
            if not self._reserve_prompt(request):
                return
            self.waiting.popleft()
            request.state = RequestState.RUNNING
            self.running.append(request)
            length = min(request.num_uncomputed, budget)
            plan.append(Chunk(request, request.num_computed, length))
            budget -= length

    def _reserve_prompt(self, request: Request) -> bool:
        """Pages for all tokens so far, reusing known prefixes; False when they do not fit now."""
        cached: list[int] = []
        # A reused page has no logits, so a request that wants its prompt's starts from nothing.
        if self.prefix_cache is not None and not request.params.prompt_logprobs:
            cached = self.prefix_cache.match(request.token_ids, root=request.cache_root)
        count = self.pool.pages_for(len(request.token_ids)) - len(cached)
        # Head room of a page for each running request, or admission would only cause preemption.
        if not self._ensure_free(count + len(self.running)):
            self.pool.release(cached)
            return False
        request.pages = cached + self.pool.allocate(count)
        request.num_computed = len(cached) * self.pool.page_size
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
        return True

    def _take_pages(self, request: Request, num_tokens: int, planned: set[int]) -> bool:
        """Give `request` pages for `num_tokens` tokens; False when it was itself preempted."""
        count = self.pool.pages_for(num_tokens) - len(request.pages)
        if count <= 0:
            return True
        while not self._ensure_free(count):
            victim = next(r for r in reversed(self.running) if r.id not in planned)
            self._preempt(victim)
            if victim is request:
                return False
        request.pages += self.pool.allocate(count)
        return True

    def _ensure_free(self, count: int) -> bool:
        missing = count - self.pool.num_free
        if missing > 0 and self.prefix_cache is not None:
            self.prefix_cache.evict(missing)
        return self.pool.num_free >= count

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._free_pages(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _free_pages(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages = []
