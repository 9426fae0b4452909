"""OpenAI's own client beside the plain cases of test_server.py: asynchronous, cancelled, many."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import openai
import pytest

FREE: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
Work = Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, None]]


def run(url: str, work: Work) -> None:
    async def go() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:
            await work(client)

    asyncio.run(go())


def running(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("quantgate_num_requests_run"))


def await_idle(url: str) -> None:
    deadline = time.monotonic() + 30
    while running(url) > 0:
        assert time.monotonic() < deadline, "a request of a client that left goes on"
        time.sleep(0.05)


def test_forty_asynchronous_streams_each_get_their_own_answer(shared_url: str) -> None:
    async def work(client: openai.AsyncOpenAI) -> None:
        async def ask(number: int, *, stream: bool) -> str:
            options: dict[str, Any] = {
                "model": "tiny", "prompt": [2 + number, 7], "max_tokens": 12, "seed": number, **FREE
            }  # fmt: skip
            if not stream:
                return (await client.completions.create(**options)).choices[0].text
            chunks = await client.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        streamed = await asyncio.gather(*(ask(number, stream=True) for number in range(40)))
        whole = await asyncio.gather(*(ask(number, stream=False) for number in range(40)))
        assert streamed == whole

    run(shared_url, work)


def test_a_stream_that_is_closed_early_ends_its_request(shared_url: str) -> None:
    async def work(client: openai.AsyncOpenAI) -> None:
        stream = await client.completions.create(
            model="tiny", prompt=[9, 9], max_tokens=240, stream=True, **FREE
        )
        async for _ in stream:
            break
        await stream.close()

    run(shared_url, work)
    await_idle(shared_url)


def test_a_cancelled_task_ends_its_request(shared_url: str) -> None:
    async def work(client: openai.AsyncOpenAI) -> None:
        asking = asyncio.create_task(
            client.completions.create(model="tiny", prompt=[9, 8], max_tokens=240, n=16, **FREE)
        )
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    run(shared_url, work)
    await_idle(shared_url)


def test_a_client_s_own_timeout_ends_its_request(shared_url: str) -> None:
    async def work(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(
                model="tiny", prompt=[9, 7], max_tokens=240, n=32, timeout=0.05, **FREE
            )

    run(shared_url, work)
    await_idle(shared_url)


def test_a_schema_is_followed_in_chat(shared_url: str) -> None:
    schema = {
        "type": "object",
        "properties": {"quantity": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["quantity"],
        "additionalProperties": False,
    }

    async def work(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "3 nuts"}],
            max_tokens=100,
            n=8,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "order", "schema": schema, "strict": True},
            },
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert choice.message.content is not None
            assert 1 <= json.loads(choice.message.content)["quantity"] <= 99

    run(shared_url, work)


def test_a_schema_that_cannot_be_followed_is_a_bad_request(shared_url: str) -> None:
    async def work(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="cannot be followed"):
            await client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "3 nuts"}],
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"not": {}}},
                },
            )

    run(shared_url, work)
