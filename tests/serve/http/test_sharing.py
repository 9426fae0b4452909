"""What clients who ask the same share: one computation, or an answer that was kept."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="module")
def url(serve: Serve) -> Iterator[str]:
    caches = ("--response-cache-mib", "4", "--embedding-cache-mib", "4")
    with serve("--kv-tokens", "4096", *caches) as found:
        yield found


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"quantgate_{name}{{"))


def test_an_embedding_is_kept(url: str) -> None:
    body = {"input": [[9, 8, 7]]}
    first = httpx.post(f"{url}/v1/embeddings", json=body)
    hits = metric(url, "answer_cache_hits_total")
    second = httpx.post(f"{url}/v1/embeddings", json=body)
    assert [answer.headers.get("x-cache") for answer in (first, second)] == [None, "hit"]
    assert first.json() == second.json()
    assert metric(url, "answer_cache_hits_total") == hits + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_kept_answer_is_the_same_and_says_that_it_is_kept(url: str, stream: bool) -> None:
    body = {
        "prompt": [4, 4, 9 + stream],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 2,
        "stop": ["zz"],
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
    }
    answers = [httpx.post(f"{url}/v1/completions", json=body, timeout=60) for _ in range(2)]
    assert [answer.headers.get("x-cache") for answer in answers] == [None, "hit"]
    texts = [_text(answer, stream=stream) for answer in answers]
    assert texts[0] == texts[1]
    usages = [_last(answer, stream=stream)["usage"] for answer in answers]
    assert usages[0]["completion_tokens"] == usages[1]["completion_tokens"]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 3]


def test_a_sampled_answer_is_never_kept(url: str) -> None:
    body = {"prompt": [4, 5], "max_tokens": 4, "temperature": 1, "seed": 3}
    answers = [httpx.post(f"{url}/v1/completions", json=body) for _ in range(2)]
    assert [answer.headers.get("x-cache") for answer in answers] == [None, None]


def test_equal_choices_are_computed_once(url: str) -> None:
    before = metric(url, "generation_tokens_total")
    body = {"prompt": [6, 6, 6], "max_tokens": 5, "temperature": 0, "ignore_eos": True, "n": 4}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert len({choice["text"] for choice in answer.json()["choices"]}) == 1
    assert answer.json()["usage"]["completion_tokens"] == 20
    assert answer.headers["x-cache"] == "partial"
    assert metric(url, "generation_tokens_total") == before + 5


def test_clients_at_once_share_one_computation_though_one_leaves(url: str) -> None:
    body = {"prompt": [8] * 3, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    before = metric(url, "generation_tokens_total")
    joined = metric(url, "coalesced_requests_total")
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as leaving:
        lines = leaving.iter_lines()
        next(lines)
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(
                httpx.post(f"{url}/v1/completions", json=body | {"stream": True}, timeout=60)
            )

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        while metric(url, "coalesced_requests_total") < joined + 3 and any(
            thread.is_alive() for thread in asking
        ):
            next(lines, None)
    for thread in asking:
        thread.join()
    assert len({_text(answer, stream=True) for answer in answers}) == 1
    assert metric(url, "generation_tokens_total") == before + 200


def _last(answer: httpx.Response, *, stream: bool) -> dict[str, Any]:
    if not stream:
        return dict(answer.json())
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return dict(json.loads(events[-1]))


def _text(answer: httpx.Response, *, stream: bool) -> str:
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["text"] for choice in choices)
