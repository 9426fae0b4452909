"""Prompts in their four forms, and texts that take the tokeniser long."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate_serve.http.errors import ApiError
from quantgate_serve.http.prompts import encode_texts, parse_prompts

PIECE = 16_384


class Tokenizer:
    """A token for every character; notes how long the texts of each turn were."""

    def __init__(self) -> None:
        self.turns: list[int] = []

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        self.turns.append(0)
        return work()

    def encode(self, text: str) -> list[int]:
        self.turns[-1] += len(text)
        return list(map(ord, text))

    def run(self, texts: list[str], *, max_tokens: int) -> list[list[int]]:
        work = encode_texts(texts, self.encode, in_thread=self.in_thread, max_tokens=max_tokens)
        return asyncio.run(work)


@pytest.mark.parametrize(
    ("prompt", "texts", "token_ids"),
    [
        ("a", ["a"], None),
        (["a", "b"], ["a", "b"], None),
        ([1, 2], None, [[1, 2]]),
        ([[1], [2, 3]], None, [[1], [2, 3]]),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, texts: Any, token_ids: Any) -> None:
    prompts = parse_prompts(prompt, vocab_size=10)
    assert (prompts.texts, prompts.token_ids) == (texts, token_ids)


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], [[1], "a"], [[True]], {}, 3, None, [10], [-1], [[1.5]]]
)
def test_any_other_prompt_is_a_400(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse_prompts(prompt, vocab_size=10)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_an_empty_prompt_is_told_what_it_lacks() -> None:
    with pytest.raises(ApiError, match=r"^prompt: there must be at least one token\.$"):
        parse_prompts([[1], []], vocab_size=10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.sampled_from([0, 1, 9_000, PIECE - 1, PIECE, PIECE + 1]), max_size=9))
def test_every_text_is_encoded_whole_and_in_its_place(lengths: list[int]) -> None:
    tokenizer = Tokenizer()
    texts = [chr(97 + index) * length for index, length in enumerate(lengths)]
    found = tokenizer.run(texts, max_tokens=PIECE)
    assert found == [[97 + index] * length for index, length in enumerate(lengths)]
    # Nobody waits for more than a piece, but for one text that may still fit.
    assert all(turn <= PIECE + 1 for turn in tokenizer.turns)


def test_a_text_that_cannot_fit_is_refused_after_a_few_pieces() -> None:
    tokenizer = Tokenizer()
    with pytest.raises(ApiError, match="a request may have 20000 tokens") as caught:
        tokenizer.run(["ok", "a" * 4_000_000], max_tokens=20_000)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert tokenizer.turns == [2, PIECE, PIECE, PIECE]


def test_a_text_of_up_to_twice_the_limit_is_left_to_those_who_count_exactly() -> None:
    assert len(Tokenizer().run(["a" * 40_000], max_tokens=20_000)[0]) == 40_000
    with pytest.raises(ApiError):
        Tokenizer().run(["a" * 40_001], max_tokens=20_000)
