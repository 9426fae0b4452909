"""Each token of a step has its id, its position and the slot that its sequence's pages give it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate_serve.page_tables import PageTables
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.scheduler import Chunk
from quantgate_serve.step_inputs import build_inputs

SIZE = 4


def chunk(start: int, length: int, *, more: int = 0, pages: list[int] | None = None) -> Chunk:
    """Tokens `start` to `start + length` of a sequence that has `more` after them."""
    count = start + length + more
    request = Request([100 * (start + 1) + at for at in range(count)], SamplingParams())
    request.pages = list(range(1, 2 + count // SIZE)) if pages is None else pages
    return Chunk(request, start, length)


@given(
    decodes=st.lists(st.integers(1, 30), max_size=5),
    prompts=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=4),
)
def test_every_token_lies_where_its_page_says(
    decodes: list[int], prompts: list[tuple[int, int]]
) -> None:
    chunks = [chunk(start, 1) for start in decodes]
    chunks += [chunk(start, length, more=1) for start, length in prompts]
    tables = PageTables(width=16, null_page=50, num_rows=1)
    found = build_inputs(chunks, tables, num_decodes=len(decodes), page_size=SIZE)
    at = 0
    for index, one in enumerate(chunks):
        assert found.firsts[index] == at
        for position in range(one.start, one.start + one.length):
            page = one.request.pages[position // SIZE]
            assert found.ids[at] == one.request.token_ids[position]
            assert found.positions[at] == position
            assert found.slots[at] == page * SIZE + position % SIZE
            at += 1
        held = found.table[found.rows[index], : len(one.request.pages)]
        assert held.tolist() == one.request.pages
    assert len(found.ids) == len(found.positions) == len(found.slots) == at
    assert found.starts.tolist() == [one.start for one in chunks]
    assert found.lengths.tolist() == [one.length for one in chunks]


def test_a_token_beyond_its_pages_is_never_given_the_slot_of_another() -> None:
    tables = PageTables(width=2, null_page=50)
    lost = chunk(SIZE, 1, pages=[3])
    found = build_inputs([lost], tables, num_decodes=1, page_size=SIZE)
    assert found.slots.tolist() == [50 * SIZE]  # the page of nobody
    with pytest.raises(IndexError):
        build_inputs([chunk(2 * SIZE, 1, pages=[3])], tables, num_decodes=1, page_size=SIZE)
