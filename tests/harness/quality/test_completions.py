"""How prompts travel: in which groups and order, and how many requests at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.quality.completions import Batching, CompletionClient, complete_each

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    size=st.integers(1, 20),
    seed=st.one_of(st.none(), st.integers(0, 9)),
)
def test_every_prompt_travels_once_in_groups_of_at_most_the_size(
    lengths: list[int], size: int, seed: int | None
) -> None:
    groups = Batching(prompts_per_request=size, shuffle_seed=seed).groups(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(1 <= len(group) <= size for group in groups)


def test_like_lengths_travel_together_unless_they_are_shuffled() -> None:
    lengths = [9, 1, 8, 2, 7, 3]
    assert Batching(prompts_per_request=2).groups(lengths) == [[1, 3], [5, 4], [2, 0]]
    shuffled = Batching(prompts_per_request=2, shuffle_seed=1).groups(lengths)
    assert shuffled != Batching(prompts_per_request=2).groups(lengths)
    assert shuffled == Batching(prompts_per_request=2, shuffle_seed=1).groups(lengths)


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_are_in_flight_than_asked_for(
    serve: Callable[..., Any], limit: int
) -> None:
    here = most = 0

    async def answer(body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal here, most
        here += 1
        most = max(most, here)
        await asyncio.sleep(0.02)
        here -= 1
        return 200, {"choices": [{"index": i} for i in range(len(body["prompt"]))]}

    async def ask(url: str) -> None:
        async with aiohttp.ClientSession() as session:
            client = CompletionClient(session, url, Batching(requests_in_flight=limit))
            await asyncio.gather(*(complete_each(client, {}, [[1], [2]]) for _ in range(9)))

    with serve(answer) as url:
        asyncio.run(ask(url))
    assert most == limit
