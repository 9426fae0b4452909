"""Rows that are kept from step to step say what the sequences' own lists of pages say."""

import random

import pytest

from quantgate_serve.page_tables import PageTables
from quantgate_serve.request import Request, SamplingParams

WIDTH, NULL = 6, 99


def sequence(*pages: int) -> Request:
    request = Request([2], SamplingParams())
    request.pages = list(pages)
    return request


def read(tables: PageTables, requests: list[Request]) -> list[list[int]]:
    rows = tables.rows_of(requests)
    assert len(set(rows.tolist())) == len(requests), "two sequences share a row"
    found: list[list[int]] = tables.pages[rows].tolist()
    return found


def padded(request: Request) -> list[int]:
    return request.pages + [NULL] * (WIDTH - len(request.pages))


def test_a_row_follows_its_sequence_and_keeps_its_place() -> None:
    tables = PageTables(width=WIDTH, null_page=NULL)
    one, other = sequence(1, 2), sequence()
    before = tables.rows_of([one, other]).tolist()
    one.pages += [7]
    other.pages += [3, 4, 5, 6, 8, 9]  # as wide as a row
    assert read(tables, [other, one]) == [padded(other), padded(one)]
    assert tables.rows_of([one, other]).tolist() == before


def test_pages_taken_back_leave_nothing_in_the_row() -> None:
    tables = PageTables(width=WIDTH, null_page=NULL)
    request = sequence(1, 2, 3, 4)
    read(tables, [request])
    request.pages = []
    assert read(tables, [request]) == [[NULL] * WIDTH]
    request.pages = [1, 9]  # another list, as after an interruption
    assert read(tables, [request]) == [padded(request)]


def test_another_list_of_the_same_length_is_seen() -> None:
    tables = PageTables(width=WIDTH, null_page=NULL)
    request = sequence(1, 2)
    read(tables, [request])
    request.pages = [5, 6]
    assert read(tables, [request]) == [[5, 6, *[NULL] * 4]]


def test_rows_of_those_that_are_gone_are_given_away_and_more_are_made_when_all_stay() -> None:
    tables = PageTables(width=WIDTH, null_page=NULL, num_rows=2)
    first = [sequence(1, 2, 3), sequence(4)]
    read(tables, first)
    second = [sequence(5), sequence(6)]
    assert read(tables, second) == [padded(request) for request in second]
    assert len(tables.pages) == 2
    everyone = [*first, *second, sequence()]
    assert read(tables, everyone) == [padded(request) for request in everyone]
    assert len(tables.pages) == 8
    assert read(tables, second) == [padded(request) for request in second]


def test_any_course_of_events_leaves_the_rows_right() -> None:
    source = random.Random(3)
    tables = PageTables(width=WIDTH, null_page=NULL, num_rows=2)
    alive = [sequence(page) for page in range(3)]
    for _ in range(400):
        request = source.choice(alive)
        match source.randrange(4):
            case 0 if len(request.pages) < WIDTH:
                request.pages += [source.randrange(NULL)]
            case 1:
                request.pages = [source.randrange(NULL) for _ in range(source.randrange(WIDTH))]
            case 2:
                alive[alive.index(request)] = sequence(source.randrange(NULL))
            case 3 if len(alive) < 9:
                alive.append(sequence())
        some = source.sample(alive, source.randint(1, len(alive)))
        assert read(tables, some) == [padded(one) for one in some]


def test_a_sequence_longer_than_a_row_is_refused_and_its_neighbour_is_left_alone() -> None:
    tables = PageTables(width=WIDTH, null_page=NULL)
    long, other = sequence(), sequence(7)
    read(tables, [long, other])
    long.pages += range(WIDTH)
    assert read(tables, [long, other]) == [padded(long), padded(other)]
    long.pages += [50]
    with pytest.raises(ValueError, match="has 7 pages, its row has room for 6"):
        tables.rows_of([long])
    assert read(tables, [other]) == [padded(other)]
