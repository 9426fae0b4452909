"""Properties of the page pool."""

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


def test_pages_come_in_the_order_in_which_they_lie_also_when_given_back() -> None:
    pool = PagePool(8)
    assert pool.allocate(3) == [0, 1, 2]
    pages = pool.allocate(4)
    assert pages == [3, 4, 5, 6]
    pool.release(pages)
    assert pool.allocate(5) == [3, 4, 5, 6, 7]


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share and give back pages in any order; the books always match."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12)
        self.holders: list[list[int]] = []

    @rule(count=st.integers(0, 6))
    def take(self, count: int) -> None:
        if count <= self.pool.num_free:
            self.holders.append(self.pool.allocate(count))
        else:
            with pytest.raises(PoolExhaustedError):
                self.pool.allocate(count)

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
