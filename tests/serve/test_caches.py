"""A cache keeps what fits and is young enough, and forgets what was used least recently."""

from hypothesis import given
from hypothesis import strategies as st

from quantgate_serve.caches import BoundedCache, keep_last


def test_an_entry_is_found_until_it_is_too_old() -> None:
    now = [0.0]
    cache: BoundedCache[str] = BoundedCache(max_bytes=10, ttl_s=5.0, clock=lambda: now[0])
    cache.put("a", "A", num_bytes=4)
    now[0] = 4.999
    assert cache.get("a") == "A"
    now[0] = 5.0
    assert cache.get("a") is None
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_the_least_recently_used_is_dropped_first() -> None:
    cache: BoundedCache[str] = BoundedCache(max_bytes=10, ttl_s=5.0)
    cache.put("a", "A", num_bytes=5)
    cache.put("b", "B", num_bytes=5)
    assert cache.get("a") == "A"
    cache.put("c", "C", num_bytes=5)
    assert [cache.get(key) for key in "abc"] == ["A", None, "C"]


def test_what_never_fits_is_not_kept_and_drops_nothing() -> None:
    cache: BoundedCache[str] = BoundedCache(max_bytes=10, ttl_s=5.0)
    cache.put("a", "A", num_bytes=10)
    cache.put("b", "B", num_bytes=11)
    assert [cache.get(key) for key in "ab"] == ["A", None]


def test_a_cache_of_no_bytes_is_off() -> None:
    cache: BoundedCache[str] = BoundedCache(max_bytes=0, ttl_s=5.0)
    cache.put("a", "A", num_bytes=1)
    assert not cache.is_on
    assert cache.get("a") is None


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 12)), max_size=60))
def test_the_bytes_are_those_of_the_entries_and_within_the_bound(
    puts: list[tuple[int, int]],
) -> None:
    cache: BoundedCache[int] = BoundedCache(max_bytes=20, ttl_s=5.0)
    sizes: dict[int, int] = {}
    for key, num_bytes in puts:
        cache.put(key, key, num_bytes=num_bytes)
        sizes[key] = num_bytes
        assert cache.get(key) == key
        assert cache.num_bytes <= 20
    assert cache.num_bytes == sum(sizes[key] for key in range(7) if cache.get(key) is not None)


def test_what_was_made_of_the_last_object_is_not_made_again() -> None:
    asked: list[list[int]] = []

    def count(numbers: list[int]) -> int:
        asked.append(numbers)
        return len(numbers)

    kept, first, equal = keep_last(count), [1, 2], [1, 2]
    assert [kept(first), kept(first)] == [2, 2]
    # Another object counts as another, and only the last is remembered.
    assert [kept(equal), kept(first)] == [2, 2]
    assert list(map(id, asked)) == list(map(id, [first, equal, first]))
