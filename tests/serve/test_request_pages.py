"""Pages come from the pool or from the prefix cache, and none is lost on the way."""

from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.request_pages import RequestPages

PAGE = PagePool(1).page_size


def request_of(num_tokens: int) -> Request:
    return Request([2 + i % 50 for i in range(num_tokens)], SamplingParams(max_tokens=8))


def pages_of(num_pages: int, *, cached: bool = True) -> tuple[PagePool, RequestPages]:
    pool = PagePool(num_pages)
    return pool, RequestPages(pool, PrefixCache(pool) if cached else None)


def test_a_request_fits_only_with_its_head_room() -> None:
    pool, pages = pages_of(4, cached=False)
    request = request_of(2 * PAGE)
    assert not pages.reserve(request, head_room=3)
    assert (request.pages, pool.num_free) == ([], 4)
    assert pages.reserve(request, head_room=2)
    assert (len(request.pages), request.num_computed, pool.num_free) == (2, 0, 2)
    pages.check_integrity([request])


def test_pages_of_a_known_beginning_are_shared_and_given_back_if_the_rest_does_not_fit() -> None:
    _, pages = pages_of(4)
    first = request_of(2 * PAGE + 1)
    assert pages.reserve(first, head_room=0)
    pages.remember(first, first.token_ids)
    second = request_of(2 * PAGE + 1)
    assert not pages.reserve(second, head_room=1)
    assert second.pages == []
    pages.check_integrity([first, second])
    assert pages.reserve(second, head_room=0)
    assert second.pages[:2] == first.pages[:2]
    assert second.num_computed == second.num_cached == 2 * PAGE
    pages.check_integrity([first, second])


def test_what_is_remembered_makes_room_for_who_needs_it() -> None:
    pool, pages = pages_of(2)
    first = request_of(2 * PAGE)
    assert pages.reserve(first, head_room=0)
    pages.remember(first, first.token_ids)
    pages.release(first)
    assert (first.pages, pool.num_cached) == ([], 2)
    other = Request([1] * PAGE, SamplingParams(max_tokens=8))
    assert pages.reserve(other, head_room=0)
    assert pages.grow(other)
    assert not pages.grow(other)
    pages.check_integrity([other])


def test_logits_of_a_whole_prompt_are_computed_from_nothing() -> None:
    _, pages = pages_of(8)
    first = request_of(2 * PAGE)
    assert pages.reserve(first, head_room=0)
    pages.remember(first, first.token_ids)
    read = Request(first.token_ids, SamplingParams(max_tokens=0, prompt_logprobs=True))
    assert read.params.reads_whole_prompt
    assert pages.reserve(read, head_room=0)
    assert read.num_computed == 0
    assert not set(read.pages) & set(first.pages)
