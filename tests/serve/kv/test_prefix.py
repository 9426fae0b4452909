"""What the prefix cache finds again, and what it forgets first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache


def remember(cache: PrefixCache, pool: PagePool, tokens: list[int], *, root: str = "") -> list[int]:
    """Puts `tokens` into the cache as a request would, then lets go of the pages."""
    pages = pool.allocate(pool.pages_for(len(tokens)))
    cache.insert(tokens, pages, root=root)
    cache.release(pages)
    return pages


def test_only_whole_pages_are_found_again() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool)
    pages = remember(cache, pool, list(range(10)))
    assert cache.match(list(range(10))) == pages[:2]
    assert cache.match([0, 1, 2, 3, 9, 9, 9, 9, 9]) == pages[:1]
    assert cache.match([9, *range(1, 10)]) == []


def test_the_last_token_is_always_left_to_compute() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool)
    pages = remember(cache, pool, list(range(8)))
    assert cache.match(list(range(8))) == pages[:1]


def test_a_match_keeps_its_pages_from_eviction() -> None:
    pool = PagePool(4, page_size=4)
    cache = PrefixCache(pool)
    remember(cache, pool, list(range(8)))
    held = cache.match(list(range(9)))
    assert cache.evict(4) == 0
    cache.release(held)
    assert cache.evict(4) == 2
    assert pool.num_free == 4


def test_the_least_recently_used_leaf_goes_first() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool)
    old = list(range(8))
    new = list(range(100, 108))
    remember(cache, pool, old)
    remember(cache, pool, new)
    cache.release(cache.match([*old, 0]))
    assert cache.evict(1) == 1
    assert len(cache.match([*old, 0])) == 2
    assert len(cache.match([*new, 0])) == 1


def test_roots_do_not_share() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool)
    pages = remember(cache, pool, list(range(8)), root="a")
    assert cache.match(list(range(9)), root="b") == []
    assert cache.match(list(range(9)), root="a") == pages


def test_clearing_gives_every_page_back() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool)
    remember(cache, pool, list(range(16)))
    cache.clear()
    assert pool.num_free == 8
    pool.check_integrity([])


def test_a_parent_used_since_outlives_an_older_leaf_of_another_branch() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool)
    remember(cache, pool, list(range(8)))
    remember(cache, pool, list(range(100, 104)))
    cache.release(cache.match(list(range(5))))  # only the first page of the first branch
    assert cache.evict(2) == 2
    assert len(cache.match(list(range(5)))) == 1
    assert cache.match([*range(100, 104), 0]) == []


def test_beyond_its_budget_the_oldest_idle_pages_go_and_those_in_use_stay() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool, max_pages=2)
    held = pool.allocate(3)
    cache.insert(list(range(12)), held)
    assert len(cache) == 3
    remember(cache, pool, list(range(100, 104)))
    assert (len(cache), cache.match([*range(100, 104), 0])) == (3, [])
    cache.release(held)
    assert (len(cache), pool.num_free) == (2, 6)
    assert len(cache.match(list(range(13)))) == 2


def test_eviction_looks_only_at_what_it_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PagePool(2000, page_size=1)
    cache = PrefixCache(pool)
    for first in range(1000):
        remember(cache, pool, [first, 0])
    in_use = [cache.match([first, 0, 0]) for first in range(900)]
    looks = 0
    references = pool.references

    def counted(page: int) -> int:
        nonlocal looks
        looks += 1
        return references(page)

    monkeypatch.setattr(pool, "references", counted)
    assert cache.evict(100) == 100
    # The 900 leaves that are in use are passed once, and never again.
    assert looks <= 900 + 2 * 100 + 100
    looks = 0
    assert cache.evict(100) == 100
    assert looks <= 300
    assert len(in_use) == 900


def test_entries_of_leaves_used_again_and_again_do_not_pile_up() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool)
    remember(cache, pool, list(range(8)))
    for _ in range(10_000):
        cache.release(cache.match(list(range(9))))
    assert len(cache._idle) < 200


def test_a_page_under_a_foreign_root_is_refused_and_counted() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool)
    pages = pool.allocate(2)
    cache.insert(list(range(8)), pages, root="r", owner="a")
    assert cache.match(list(range(9)), root="r", owner="b") == []
    assert cache.cross_tenant_hits == 1
    assert cache.match(list(range(9)), root="r", owner="a") == pages
    assert cache.cross_tenant_hits == 1


def test_a_root_without_pages_is_forgotten() -> None:
    pool = PagePool(4, page_size=4)
    cache = PrefixCache(pool)
    for tenant in range(100):
        remember(cache, pool, list(range(8)), root=str(tenant))
        cache.evict(4)
    assert len(cache._roots) == 0


class PrefixMachine(RuleBasedStateMachine):
    """Requests of three tenants come, share, grow and go; the model is a set of known prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(20, page_size=2)
        self.cache = PrefixCache(self.pool, max_pages=12)
        self.held: list[tuple[str, list[int], list[int]]] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}  # page: whose, its whole prefix

    @rule(tenant=st.sampled_from("abc"), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def start(self, tenant: str, tokens: list[int]) -> None:
        cached = self.cache.match(tokens, root=tenant, owner=tenant)
        for index, page in enumerate(cached):
            assert self.content[page] == (tenant, tuple(tokens[: 2 * index + 2]))
        wanted = self.pool.pages_for(len(tokens)) - len(cached)
        if wanted > self.pool.num_free:
            self.cache.evict(wanted - self.pool.num_free)
        if wanted > self.pool.num_free:
            self.cache.release(cached)
            return
        pages = cached + self.pool.allocate(wanted)
        for index in range(len(cached), len(tokens) // 2):
            self.content[pages[index]] = (tenant, tuple(tokens[: 2 * index + 2]))
        self.held.append((tenant, tokens, pages))

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        if self.held:
            tenant, tokens, pages = data.draw(st.sampled_from(self.held))
            self.cache.insert(tokens, pages, root=tenant, owner=tenant)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.held:
            index = data.draw(st.integers(0, len(self.held) - 1))
            self.cache.release(self.held.pop(index)[2])

    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        idle, free = self.pool.num_cached, self.pool.num_free
        freed = self.cache.evict(count)
        assert self.pool.num_free == free + freed
        # A page that is idle hangs above nothing in use, unless the one below was computed twice.
        assert freed <= min(count, idle)
        if not self.held:
            assert freed == min(count, idle)

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @invariant()
    def books_match(self) -> None:
        self.cache.check_integrity()
        self.pool.check_integrity([*(pages for _, _, pages in self.held), list(self.cache.pages())])
        assert self.cache.cross_tenant_hits == 0
        if not self.held:
            assert len(self.cache) <= self.cache.max_pages


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
