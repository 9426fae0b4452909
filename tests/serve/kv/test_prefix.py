"""What the prefix cache finds again, and what it forgets first."""

from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache


def remember(cache: PrefixCache, pool: PagePool, tokens: list[int], *, root: str = "") -> list[int]:
    """Puts `tokens` into the cache as a request would, then lets go of the pages."""
    pages = pool.allocate(pool.pages_for(len(tokens)))
    cache.insert(tokens, pages, root=root)
    pool.release(pages)
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
    pool.release(held)
    assert cache.evict(4) == 2
    assert pool.num_free == 4


def test_the_least_recently_used_leaf_goes_first() -> None:
    pool = PagePool(8, page_size=4)
    cache = PrefixCache(pool)
    old = list(range(8))
    new = list(range(100, 108))
    remember(cache, pool, old)
    remember(cache, pool, new)
    pool.release(cache.match([*old, 0]))
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
