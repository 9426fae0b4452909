"""Asking a server: every item has an answer or a reason, and a neighbour costs it nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantgate.quality.answers import Answer, ask_golden_set
from quantgate.quality.golden import GoldenSet, load_golden_set
from quantgate.quality.rendering import RenderedPrompt

Serve = Callable[..., Any]
X, Y, Z = 120, 121, 122


@pytest.fixture
def texts(write_set: Callable[..., Path]) -> GoldenSet:
    lines = [{"id": f"i{n:02d}", "input": "q", "target": "x"} for n in range(20)]
    return load_golden_set(write_set(*lines))


@pytest.fixture
def choices(write_set: Callable[..., Path], choice_task: dict[str, Any]) -> GoldenSet:
    line = {"id": "a", "input": "q", "target": "x", "choices": ["x", "y"]}
    return load_golden_set(write_set(line, task=choice_task))


def prompts_of(golden: GoldenSet) -> list[RenderedPrompt]:
    """The last items have the shortest prompts, and each prompt starts with its item's number."""
    count = len(golden.items)
    return [
        RenderedPrompt(item=item, ids=(n, *[0] * (count - n)))
        for n, item in enumerate(golden.items)
    ]


def choice_prompt(golden: GoldenSet, *choice_ids: tuple[int, ...]) -> list[RenderedPrompt]:
    return [RenderedPrompt(item=golden.items[0], ids=(7, 8), choice_ids=choice_ids)]


def ask(url: str, golden: GoldenSet, prompts: list[RenderedPrompt], **more: Any) -> list[Answer]:
    return ask_golden_set(url, golden, prompts, timeout_s=more.pop("timeout_s", 10.0), **more)


def text_choices(body: dict[str, Any]) -> dict[str, Any]:
    found = [
        {
            "index": i,
            "text": f"n{ids[0]}",
            "finish_reason": "stop",
            "stop_reason": "\n",
            "token_ids": [1, 2],
        }
        for i, ids in enumerate(body["prompt"])
    ]
    # Servers may finish in any order.
    return {"choices": found[::-1]}


def test_answers_come_back_in_the_order_of_the_items_from_groups_of_like_length(
    serve: Serve, texts: GoldenSet
) -> None:
    bodies, told = [], []

    async def complete(body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        return 200, text_choices(body)

    with serve(complete) as url:
        answers = ask(url, texts, prompts_of(texts), on_answers=told.append)
    assert [a.output for a in answers] == [f"n{n}" for n in range(20)]
    assert [a.item_id for a in answers] == [item.id for item in texts.items]
    assert all(a.token_ids == (1, 2) and a.error is None for a in answers)
    assert {(a.finish_reason, a.stop_reason) for a in answers} == {("stop", "\n")}
    assert sorted(len(body["prompt"]) for body in bodies) == [4, 16]
    assert sum(told) == 20
    # The longest prompts travel together.
    (longest,) = [body for body in bodies if len(body["prompt"]) == 4]
    assert {ids[0] for ids in longest["prompt"]} == {0, 1, 2, 3}
    asked = {key: bodies[0][key] for key in ("max_tokens", "temperature", "stop")}
    assert asked == {"max_tokens": 8, "temperature": 0.0, "stop": ["\n"]}


def test_a_refused_group_is_asked_one_by_one_so_that_one_bad_item_costs_only_itself(
    serve: Serve, texts: GoldenSet
) -> None:
    async def complete(body: dict[str, Any]) -> tuple[int, Any]:
        if any(ids[0] == 5 for ids in body["prompt"]):
            return 400, {"error": {"message": "prompt too long"}}
        return 200, text_choices(body)

    with serve(complete) as url:
        answers = ask(url, texts, prompts_of(texts))
    assert [a.item_id for a in answers if a.error] == ["i05"]
    assert answers[5].error == "HTTP 400: prompt too long"
    assert (answers[5].output, answers[5].finish_reason) == ("", "error")


@pytest.mark.parametrize("text", ["null", "[]", '{"error": "no"}', "<html>busy</html>", ""])
def test_an_error_that_is_not_in_openais_form_is_kept_as_it_is(
    serve: Serve, texts: GoldenSet, text: str
) -> None:
    async def complete(_: dict[str, Any]) -> tuple[int, Any]:
        return 503, text

    with serve(complete) as url:
        answers = ask(url, texts, prompts_of(texts))
    assert {a.error for a in answers} == {f"HTTP 503: {text}"}


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"choices": [{"index": 0}]}', "<html>"])
def test_an_answer_of_another_form_is_an_error_of_each_item(
    serve: Serve, texts: GoldenSet, text: str
) -> None:
    async def complete(_: dict[str, Any]) -> tuple[int, Any]:
        return 200, text

    with serve(complete) as url:
        answers = ask(url, texts, prompts_of(texts))
    assert len(answers) == 20
    assert all(a.error for a in answers)


def test_a_server_that_is_gone_is_an_error_of_every_item(texts: GoldenSet) -> None:
    answers = ask("http://127.0.0.1:9", texts, prompts_of(texts))
    assert len(answers) == 20
    assert all("Connect" in (a.error or "") for a in answers)


def test_a_server_that_hangs_costs_one_timeout_per_group_not_one_per_item(
    serve: Serve, texts: GoldenSet
) -> None:
    import asyncio

    bodies = []

    async def complete(body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        await asyncio.sleep(0.5)
        return 200, text_choices(body)

    with serve(complete) as url:
        answers = ask(url, texts, prompts_of(texts), timeout_s=0.1)
    assert len(bodies) == 2
    assert all("Timeout" in (a.error or "") for a in answers)


def first_token(*log_probs: float) -> dict[str, Any]:
    found = dict(zip((str(X), str(Y)), log_probs, strict=True))
    return {"choices": [{"index": 0, "logprobs": {"token_id_logprobs": [found]}}]}


def test_single_token_choices_are_compared_by_the_first_token(
    serve: Serve, choices: GoldenSet
) -> None:
    bodies = []

    async def complete(body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        return 200, first_token(-2.0, -0.5)

    with serve(complete) as url:
        (answer,) = ask(url, choices, choice_prompt(choices, (X,), (Y,)))
    assert (answer.output, answer.choice_log_probs) == ("y", (-2.0, -0.5))
    assert (bodies[0]["max_tokens"], bodies[0]["logprob_token_ids"]) == (1, [X, Y])


def test_long_choices_are_compared_by_the_sum_after_the_prompt(
    serve: Serve, choices: GoldenSet
) -> None:
    bodies = []

    async def complete(body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        # The prompt's own tokens are echoed too; the first has no log-probability.
        one = {"index": 0, "logprobs": {"token_logprobs": [None, -9.0, -1.0, -1.0]}}
        two = {"index": 1, "logprobs": {"token_logprobs": [None, 0.0, -3.0]}}
        return 200, {"choices": [two, one]}

    with serve(complete) as url:
        (answer,) = ask(url, choices, choice_prompt(choices, (X, Y), (Z,)))
    assert (answer.output, answer.choice_log_probs) == ("x", (-2.0, -3.0))
    assert bodies[0]["prompt"] == [[7, 8, X, Y], [7, 8, Z]]
    assert (bodies[0]["max_tokens"], bodies[0]["echo"]) == (0, True)


def test_an_echo_that_leaves_a_token_out_is_an_error(serve: Serve, choices: GoldenSet) -> None:
    async def complete(_: dict[str, Any]) -> tuple[int, Any]:
        entry = {"logprobs": {"token_logprobs": [None, -1.0, -1.0]}}
        return 200, {"choices": [entry | {"index": i} for i in range(2)]}

    with serve(complete) as url:
        (answer,) = ask(url, choices, choice_prompt(choices, (X, Y), (Z,)))
    assert "not of the expected form" in (answer.error or "")


@pytest.mark.parametrize(
    "log_probs", [(math.nan, -1.0), (-1.0, math.nan), (math.nan, math.nan), (-math.inf, -math.inf)]
)
def test_a_model_that_computes_no_numbers_has_chosen_nothing(
    serve: Serve, choices: GoldenSet, log_probs: tuple[float, float]
) -> None:
    async def complete(_: dict[str, Any]) -> tuple[int, Any]:
        return 200, first_token(*log_probs)

    with serve(complete) as url:
        (answer,) = ask(url, choices, choice_prompt(choices, (X,), (Y,)))
    assert answer.error is not None
    assert "not numbers" in answer.error


def test_one_choice_without_any_probability_is_merely_not_chosen(
    serve: Serve, choices: GoldenSet
) -> None:
    async def complete(_: dict[str, Any]) -> tuple[int, Any]:
        return 200, first_token(-math.inf, -1.0)

    with serve(complete) as url:
        (answer,) = ask(url, choices, choice_prompt(choices, (X,), (Y,)))
    assert (answer.output, answer.error) == ("y", None)
