"""The pages of each request: taken from the pool or found in the prefix cache, and given back."""

from collections.abc import Sequence

from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.request import Request


class RequestPages:
    """Fills and empties `Request.pages`; without a prefix cache nothing is remembered."""

    def __init__(self, pool: PagePool, prefix_cache: PrefixCache | None) -> None:
        self._pool = pool
        self._prefix_cache = prefix_cache

    def reserve(self, request: Request, *, head_room: int) -> bool:
        """Pages for all tokens so far, reusing known prefixes; False when they do not fit now,
        `head_room` more being free."""
        cached: list[int] = []
        # A reused page has no logits, so a request that wants its prompt's starts from nothing.
        if self._prefix_cache is not None and not request.params.reads_whole_prompt:
            cached = self._prefix_cache.match(
                request.token_ids, root=request.cache_root, owner=request.tenant
            )
        count = self._pool.pages_for(len(request.token_ids)) - len(cached)
        if not self._ensure_free(count + head_room):
            self._give_back(cached)
            return False
        request.pages = cached + self._pool.allocate(count, after=cached[-1] if cached else None)
        request.num_computed = len(cached) * self._pool.page_size
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
        return True

    def grow(self, request: Request) -> bool:
        """One more page for `request`; False when there is none."""
        if not self._ensure_free(1):
            return False
        request.pages += self._pool.allocate(1, after=request.pages[-1])
        return True

    def remember(self, request: Request, tokens: list[int]) -> None:
        """Keep the pages of `tokens`, with which `request` begins, for who begins so, too."""
        if self._prefix_cache is not None:
            self._prefix_cache.insert(
                tokens, request.pages, root=request.cache_root, owner=request.tenant
            )

    def release(self, request: Request) -> None:
        self._give_back(request.pages)
        request.pages = []

    def check_integrity(self, requests: Sequence[Request]) -> None:
        """Raise PageIntegrityError unless every page is one of `requests`', remembered or free."""
        holders: list[list[int]] = [request.pages for request in requests]
        if self._prefix_cache is not None:
            holders.append(list(self._prefix_cache.pages()))
            self._prefix_cache.check_integrity()
        self._pool.check_integrity(holders)

    def _ensure_free(self, count: int) -> bool:
        missing = count - self._pool.num_free
        if missing > 0 and self._prefix_cache is not None:
            self._prefix_cache.evict(missing)
        return self._pool.num_free >= count

    def _give_back(self, pages: list[int]) -> None:
        if self._prefix_cache is None:
            self._pool.release(pages)
        else:
            self._prefix_cache.release(pages)
