"""Properties of the page pool."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quantgate_serve.kv.pool import PageIntegrityError, PagePool, PoolExhaustedError


def test_allocation_beyond_the_free_pages_takes_nothing() -> None:
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(PoolExhaustedError, match="2 KV pages wanted, 1 are free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_a_shared_page_is_free_only_after_its_last_release() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.retain(pages)
    pool.release(pages)
    assert pool.num_free == 0
    pool.release(pages)
    assert pool.num_free == 1


def test_releasing_too_often_is_an_error() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(PageIntegrityError, match="released more often"):
        pool.release(pages)


def test_sharing_a_free_page_is_an_error() -> None:
    with pytest.raises(PageIntegrityError, match="is free"):
        PagePool(2).retain([0])


@given(num_tokens=st.integers(0, 10_000), page_size=st.integers(1, 64))
def test_pages_for_is_the_least_number_that_holds_the_tokens(
    num_tokens: int, page_size: int
) -> None:
    pages = PagePool(1, page_size=page_size).pages_for(num_tokens)
    assert (pages - 1) * page_size < num_tokens or num_tokens == 0
    assert num_tokens <= pages * page_size


@pytest.mark.parametrize(
    ("holders", "message"),
    [
        ([[0, 0]], "twice"),
        ([[0], [0]], "counts 1 references, 2 are held"),
        ([], "counts 1 references, 0 are held"),
        ([[0, 1]], "counts 0 references, 1 are held"),
    ],
)
def test_integrity_check_finds(holders: list[list[int]], message: str) -> None:
    pool = PagePool(2)
    assert pool.allocate(1) == [0]
    with pytest.raises(PageIntegrityError, match=message):
        pool.check_integrity(holders)


@pytest.mark.parametrize(
    ("name", "value"), [("num_free", 7), ("_free_in", b"\7"), ("_most_free", 7)]
)
def test_integrity_check_finds_free_pages_that_are_not_counted(name: str, value: object) -> None:
    pool = PagePool(8)
    pool.check_integrity([])
    setattr(pool, name, value)
    with pytest.raises(PageIntegrityError, match="count as free"):
        pool.check_integrity([])


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_pool_smaller_than_a_stretch_gives_its_pages_in_order(count: int) -> None:
    assert PagePool(8).allocate(count) == list(range(count))


def test_a_long_prompt_goes_through_stretches_in_order() -> None:
    assert PagePool(43).allocate(42) == list(range(42))


def test_a_sequence_goes_on_with_the_page_behind_its_last() -> None:
    pool = PagePool(64)
    pages = pool.allocate(3)
    assert pool.allocate(2, after=pages[-1]) == [3, 4]


def test_where_the_next_page_is_taken_a_sequence_goes_on_in_an_empty_stretch() -> None:
    pool = PagePool(64)
    assert pool.allocate(20) == list(range(20))
    assert pool.allocate(2, after=7) == [32, 33]
    # Seven more lie between, then the pages of the first sequence.
    pool.release(list(range(9, 16)))
    assert pool.allocate(9, after=8) == [*range(9, 16), 48, 49]


def test_behind_the_last_page_a_sequence_goes_on_elsewhere() -> None:
    pool = PagePool(20)
    pages = pool.allocate(20)
    pool.release([0, 1])
    assert pool.allocate(1, after=pages[-1]) == [0]


def test_new_sequences_begin_in_empty_stretches() -> None:
    pool = PagePool(48)
    assert [pool.allocate(1)[0] for _ in range(3)] == [0, 16, 32]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        pytest.param(1, [8], id="half of the room is left to the sequence before"),
        pytest.param(8, [*range(8, 16)], id="as many as half of it"),
        pytest.param(12, [*range(4, 16)], id="less, where more is needed"),
        pytest.param(17, [*range(1, 16), 25, 26], id="nothing, where all of it is needed"),
    ],
)
def test_without_an_empty_stretch_pages_lie_in_the_emptiest(
    count: int, expected: list[int]
) -> None:
    pool = PagePool(32)
    pool.allocate(1)
    pool.allocate(2)
    assert pool.allocate(count) == expected


def test_the_longest_run_of_the_emptiest_stretch_is_chosen() -> None:
    pool = PagePool(32)
    pool.allocate(32)
    pool.release([1, 2, 3, 20, 21, 24, 25, 26])
    assert pool.allocate(3) == [24, 25, 26]


def test_a_stretch_that_was_given_back_is_found_again() -> None:
    pool = PagePool(64)
    pages = pool.allocate(64)
    pool.release(pages[:5])
    pool.release(pages[32:48])
    assert pool.allocate(16) == pages[32:48]
    pool.release(pages[48:])
    assert pool.allocate(1) == [48]


def test_sequences_that_grow_side_by_side_keep_their_pages_together() -> None:
    pool = PagePool(8 * 16)
    sequences = [pool.allocate(2) for _ in range(8)]
    while pool.num_free:
        for pages in sequences:
            pages += pool.allocate(1, after=pages[-1])
    for pages in sequences:
        assert pages == list(range(pages[0], pages[0] + 16))


@pytest.mark.parametrize("num_pages", [1, 15, 16, 17, 100])
def test_every_page_can_be_taken_whatever_was_given_back_before(num_pages: int) -> None:
    source = random.Random(num_pages)
    pool = PagePool(num_pages)
    held = pool.allocate(num_pages)
    for _ in range(200):
        source.shuffle(held)
        count = source.randint(1, num_pages)
        given, held = held[:count], held[count:]
        pool.release(given)
        while pool.num_free:
            after = source.choice([None, *range(num_pages)])
            held += pool.allocate(source.randint(1, pool.num_free), after=after)
        assert sorted(held) == list(range(num_pages))
        pool.check_integrity([held])


class PoolMachine(RuleBasedStateMachine):
    """Holders take, grow, share and give back pages in any order; the books always match."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(40)
        self.holders: list[list[int]] = []

    @rule(count=st.integers(0, 20))
    def take(self, count: int) -> None:
        if count <= self.pool.num_free:
            self.holders.append(self.pool.allocate(count))
        else:
            with pytest.raises(PoolExhaustedError):
                self.pool.allocate(count)

    @rule(data=st.data(), count=st.integers(1, 3))
    def grow(self, data: st.DataObject, count: int) -> None:
        growing = [pages for pages in self.holders if pages]
        if not growing or count > self.pool.num_free:
            return
        pages = data.draw(st.sampled_from(growing))
        follows = pages[-1] + 1
        is_free = follows < self.pool.num_pages and self.pool.references(follows) == 0
        more = self.pool.allocate(count, after=pages[-1])
        assert (more[0] == follows) == is_free
        pages += more

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.holders:
            pages = data.draw(st.sampled_from(self.holders))
            self.pool.retain(pages)
            self.holders.append(list(pages))

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.holders:
            index = data.draw(st.integers(0, len(self.holders) - 1))
            self.pool.release(self.holders.pop(index))

    @invariant()
    def books_match(self) -> None:
        self.pool.check_integrity(self.holders)


TestPoolMachine = PoolMachine.TestCase


def test_a_page_is_freed_by_those_who_hold_it_together_and_once() -> None:
    pool = PagePool(8)
    own, shared, cached, staying = pool.allocate(4)
    pool.retain([shared, staying])
    pool.retain_cached(cached)
    first, second = [own, shared, cached, staying], [shared]
    assert pool.count_freed([first]) == 2  # own, and cached for whoever needs it
    assert pool.count_freed([first, second]) == 3
    assert pool.count_freed([]) == 0
