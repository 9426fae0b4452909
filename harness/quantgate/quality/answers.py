"""Asking a running server every item of a golden set, and keeping each answer.

Generation goes through /v1/completions with token ids, so the server tokenises nothing. Choices are
compared by the log-probability of their tokens after the prompt.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from quantgate.quality.completions import (
    FULL_BATCHES,
    UNEXPECTED,
    Batching,
    CompletionClient,
    complete_each,
)
from quantgate.quality.golden import GoldenSet
from quantgate.quality.rendering import RenderedPrompt
from quantgate.quality.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the server said to one item; `error` is None unless it said nothing usable."""

    item_id: str
    output: str
    finish_reason: str
    stop_reason: str | None = None
    """The stop string that ended it; None for an end token, the limit, or a choice."""
    token_ids: tuple[int, ...] = ()
    choice_log_probs: tuple[float, ...] = ()
    error: str | None = None


def ask_golden_set(
    url: str,
    golden: GoldenSet,
    prompts: Sequence[RenderedPrompt],
    *,
    timeout_s: float,
    on_answers: Callable[[int], None] | None = None,
    batching: Batching = FULL_BATCHES,
) -> list[Answer]:
    """Asks every item; answers come back in the order of `prompts`.

    A refused or failed item is an Answer with `error`, since a missing answer must count against
    the variant. `on_answers` is told how many more items have been answered.
    """
    return asyncio.run(
        _ask_all(url, golden, prompts, timeout_s, on_answers or (lambda _: None), batching)
    )


async def _ask_all(
    url: str,
    golden: GoldenSet,
    prompts: Sequence[RenderedPrompt],
    timeout_s: float,
    on_answers: Callable[[int], None],
    batching: Batching,
) -> list[Answer]:
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        client = CompletionClient(session, url, batching)
        ask = _ask_choices if golden.task.output_type == "multiple_choice" else _ask_texts
        groups = batching.groups([len(prompt.ids) for prompt in prompts])

        async def answer(group: list[int]) -> list[tuple[int, Answer]]:
            asked = [prompts[i] for i in group]
            answers = await ask(client, golden.task, asked)
            on_answers(len(answers))
            return list(zip(group, answers, strict=True))

        pairs = [pair for part in await asyncio.gather(*map(answer, groups)) for pair in part]
    return [answer for _, answer in sorted(pairs, key=lambda pair: pair[0])]


async def _ask_texts(
    client: CompletionClient, task: Task, prompts: Sequence[RenderedPrompt]
) -> list[Answer]:
    body = {
        "max_tokens": task.generation_kwargs.max_gen_toks,
        "temperature": 0.0,
        "stop": list(task.generation_kwargs.until) or None,
        "return_token_ids": True,
    }
    choices = await complete_each(client, body, [list(p.ids) for p in prompts])
    return [_read(p, [choice], _read_text) for p, choice in zip(prompts, choices, strict=True)]


async def _ask_choices(
    client: CompletionClient, task: Task, prompts: Sequence[RenderedPrompt]
) -> list[Answer]:
    answers: dict[str, Answer] = {}
    short = [p for p in prompts if all(len(ids) == 1 for ids in p.choice_ids)]
    for ids, group in _by_choices(short).items():
        body = {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": list(ids)}
        choices = await complete_each(client, body, [list(p.ids) for p in group])
        for prompt, choice in zip(group, choices, strict=True):
            answers[prompt.item.id] = _read(prompt, [choice], _read_short_choices)
    for prompt in prompts:
        if prompt.item.id not in answers:
            answers[prompt.item.id] = await _ask_long_choices(client, prompt)
    return [answers[p.item.id] for p in prompts]


def _by_choices(
    prompts: Iterable[RenderedPrompt],
) -> Mapping[tuple[int, ...], list[RenderedPrompt]]:
    """Groups prompts whose single-token choices are the same tokens."""
    groups: dict[tuple[int, ...], list[RenderedPrompt]] = {}
    for prompt in prompts:
        groups.setdefault(tuple(ids[0] for ids in prompt.choice_ids), []).append(prompt)
    return groups


async def _ask_long_choices(client: CompletionClient, prompt: RenderedPrompt) -> Answer:
    """Scores each choice by the summed log-probability of its tokens, echoed after the prompt."""
    body = {"max_tokens": 0, "temperature": 0.0, "echo": True, "logprobs": 1}
    whole = [[*prompt.ids, *ids] for ids in prompt.choice_ids]
    return _read(prompt, await complete_each(client, body, whole), _read_long_choices)


def _read(
    prompt: RenderedPrompt,
    choices: Sequence[dict[str, Any] | str],
    read: Callable[[RenderedPrompt, list[dict[str, Any]]], Answer],
) -> Answer:
    """The answer to one item, or why the choices the server sent hold none."""
    usable = [choice for choice in choices if not isinstance(choice, str)]
    reasons = [choice for choice in choices if isinstance(choice, str)]
    if reasons:
        return _failed(prompt, reasons[0])
    try:
        return read(prompt, usable)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return _failed(prompt, f"{UNEXPECTED}: {error!r}")


def _read_text(prompt: RenderedPrompt, choices: list[dict[str, Any]]) -> Answer:
    (choice,) = choices
    return Answer(
        item_id=prompt.item.id,
        output=choice["text"],
        finish_reason=choice["finish_reason"],
        stop_reason=choice["stop_reason"],
        token_ids=tuple(choice["token_ids"]),
    )


def _read_short_choices(prompt: RenderedPrompt, choices: list[dict[str, Any]]) -> Answer:
    found = choices[0]["logprobs"]["token_id_logprobs"][0]
    return _chosen(prompt, tuple(float(found[str(ids[0])]) for ids in prompt.choice_ids))


def _read_long_choices(prompt: RenderedPrompt, choices: list[dict[str, Any]]) -> Answer:
    tails = [choice["logprobs"]["token_logprobs"][len(prompt.ids) :] for choice in choices]
    expected = [len(ids) for ids in prompt.choice_ids]
    if [len(tail) for tail in tails] != expected:
        raise ValueError("not one log-probability per token of each choice")
    return _chosen(prompt, tuple(float(sum(tail)) for tail in tails))


def _chosen(prompt: RenderedPrompt, log_probs: tuple[float, ...]) -> Answer:
    # NaN compares as neither more nor less, so the first choice would win, sometimes rightly.
    if any(math.isnan(value) for value in log_probs) or max(log_probs) == -math.inf:
        return _failed(prompt, f"log-probabilities of the choices are not numbers: {log_probs}")
    best = max(range(len(log_probs)), key=log_probs.__getitem__)
    return Answer(
        item_id=prompt.item.id,
        output=prompt.item.choices[best],
        finish_reason="stop",
        choice_log_probs=log_probs,
    )


def _failed(prompt: RenderedPrompt, reason: str) -> Answer:
    return Answer(item_id=prompt.item.id, output="", finish_reason="error", error=reason)
