"""Prompts as the model sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quantgate.errors import GoldenSetError
from quantgate.quality.golden import load_golden_set
from quantgate.quality.rendering import Renderer

WriteSet = Callable[..., Path]
MESSAGES = [{"role": "user", "content": "which?"}]
CHOICES = {"id": "a", "target": "x", "choices": ["x", "yy"]}


def test_text_is_tokenised_as_it_is_and_messages_through_the_template(
    write_set: WriteSet, make_tokenizer: Callable[..., Path]
) -> None:
    folder = make_tokenizer()
    plain = {"id": "a", "input": "which?", "target": "x"}
    golden = load_golden_set(write_set(plain, plain | {"id": "b", "input": MESSAGES}))
    text, chat = Renderer(folder).render(golden)
    decode = AutoTokenizer.from_pretrained(folder).decode
    assert decode(text.ids) == "which?"
    assert decode(chat.ids) == "<user>which?\n<assistant>"
    assert text.choice_ids == ()


@pytest.mark.parametrize("prompt", ["which?\n", MESSAGES])
def test_choices_are_the_tokens_after_the_prompt(
    write_set: WriteSet,
    make_tokenizer: Callable[..., Path],
    choice_task: dict[str, Any],
    prompt: Any,
) -> None:
    folder = make_tokenizer()
    golden = load_golden_set(write_set(CHOICES | {"input": prompt}, task=choice_task))
    (rendered,) = Renderer(folder).render(golden)
    decode = AutoTokenizer.from_pretrained(folder).decode
    assert [decode(ids) for ids in rendered.choice_ids] == ["x", "yy"]
    assert [len(ids) for ids in rendered.choice_ids] == [1, 2]


def test_a_choice_that_melts_into_the_prompt_is_refused_with_its_line(
    write_set: WriteSet, make_tokenizer: Callable[..., Path], choice_task: dict[str, Any]
) -> None:
    golden = load_golden_set(write_set(CHOICES | {"input": "which ="}, task=choice_task))
    renderer = Renderer(make_tokenizer(merge=("=", "x")))
    with pytest.raises(GoldenSetError, match=r"items\.jsonl:1: choice 'x' changes the tokens"):
        renderer.render(golden)


def test_messages_without_a_chat_template_are_refused(
    write_set: WriteSet, make_tokenizer: Callable[..., Path]
) -> None:
    golden = load_golden_set(write_set({"id": "a", "input": MESSAGES, "target": "x"}))
    with pytest.raises(GoldenSetError, match="no chat template"):
        Renderer(make_tokenizer(template=None)).render(golden)


def test_choices_behind_an_added_token_are_those_of_each_prompt_alone(
    write_set: WriteSet, make_tokenizer: Callable[..., Path], choice_task: dict[str, Any]
) -> None:
    folder = make_tokenizer(merge=("x", "y"), added=["<assistant>"])
    rows = [
        {"id": str(n), "input": [{"role": "user", "content": text}], "target": choices[0]}
        | {"choices": choices}
        for n, (text, choices) in enumerate(
            [("a", ["xy", "yx"]), ("b?", ["yx", "xy", "y"]), ("c" * 200, ["xy", "x"])]
        )
    ]
    whole = Renderer(folder).render(load_golden_set(write_set(*rows, task=choice_task)))
    for row, found in zip(rows, whole, strict=True):
        (alone,) = Renderer(folder).render(load_golden_set(write_set(row, task=choice_task)))
        assert found.ids == alone.ids
        assert found.choice_ids == alone.choice_ids
    assert [len(ids) for ids in whole[1].choice_ids] == [2, 1, 1]


def test_an_added_token_that_a_longer_one_holds_shares_nothing(
    write_set: WriteSet, make_tokenizer: Callable[..., Path], choice_task: dict[str, Any]
) -> None:
    folder = make_tokenizer(added=["<assistant>", "?\n<assistant>x"])
    rows = [
        CHOICES | {"id": id, "input": [{"role": "user", "content": text}]}
        for id, text in (("a", "which"), ("b", "which?"))
    ]
    golden = load_golden_set(write_set(*rows, task=choice_task))
    with pytest.raises(GoldenSetError, match=r"items\.jsonl:2: choice 'x' changes the tokens"):
        Renderer(folder).render(golden)
