"""The open-loop client against a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from quantgate.load.client import replay


def completion(tokens: int) -> web.Response:
    return web.json_response({"usage": {"completion_tokens": tokens}})


def test_latency_counts_from_the_scheduled_time_so_that_a_queue_is_seen(
    fake_server: Callable[..., Any], requests_at: Callable[..., Any]
) -> None:
    slot = asyncio.Lock()

    async def one_at_a_time(body: dict[str, Any]) -> web.Response:
        async with slot:
            await asyncio.sleep(0.05)
        return completion(body["max_tokens"])

    server = fake_server(one_at_a_time)
    phase = replay(server.url, requests_at(0, 10, 20, 30, 40), timeout_s=10.0)
    # A client that waits for answers would see 50 ms each. Asyncio may wake 1 ms early.
    latencies = sorted(record.e2e_ms for record in phase.requests)
    for n, latency in enumerate(latencies):
        assert latency >= 50 * (n + 1) - 10 * n - 5
    assert [record.scheduled_ms for record in phase.requests] == [0, 10, 20, 30, 40]
    assert phase.duration_ms >= 245


def test_a_request_keeps_the_tokens_and_timings_that_the_server_states(
    fake_server: Callable[..., Any], requests_at: Callable[..., Any]
) -> None:
    (record,) = replay(fake_server().url, requests_at(5), timeout_s=10.0).requests
    assert (record.prompt_tokens, record.output_tokens, record.error) == (3, 2, None)
    assert record.queue_ms == 0.5
    assert record.first_token_ms == record.sent_ms + 1.0
    assert record.sent_ms >= record.scheduled_ms == 5.0


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (500, "boom", "HTTP 500: boom"),
        (429, "", "HTTP 429: "),
        (200, '{"usage": {"completion_tokens": 1}}', "1 output tokens; 2 were asked for"),
        (200, '{"usage": {"completion_tokens": 3}}', "3 output tokens; 2 were asked for"),
        (200, '{"usage": {"completion_tokens": null}}', "TypeError"),
        (200, '{"usage": {}}', "KeyError"),
        (200, "[]", "TypeError"),
        (200, "<html>", "JSONDecodeError"),
    ],
)
def test_what_is_not_the_answer_asked_for_is_a_failed_request(
    fake_server: Callable[..., Any],
    requests_at: Callable[..., Any],
    status: int,
    text: str,
    error: str,
) -> None:
    async def complete(_: dict[str, Any]) -> web.Response:
        return web.Response(status=status, text=text)

    (record,) = replay(fake_server(complete).url, requests_at(0), timeout_s=10.0).requests
    assert record.error is not None
    assert record.error.startswith(error)


def test_timings_are_optional(
    fake_server: Callable[..., Any], requests_at: Callable[..., Any]
) -> None:
    async def complete(_: dict[str, Any]) -> web.Response:
        return web.json_response({"usage": {"completion_tokens": 2}, "timings": None})

    (record,) = replay(fake_server(complete).url, requests_at(0), timeout_s=10.0).requests
    assert (record.first_token_ms, record.queue_ms, record.error) == (None, None, None)


def test_a_request_out_of_time_and_a_server_that_is_gone_are_failed_requests(
    fake_server: Callable[..., Any], requests_at: Callable[..., Any]
) -> None:
    async def hang(_: dict[str, Any]) -> web.Response:
        await asyncio.sleep(1)
        return completion(2)

    (record,) = replay(fake_server(hang).url, requests_at(0), timeout_s=0.1).requests
    assert "Timeout" in (record.error or "")
    gone = replay("http://127.0.0.1:9", requests_at(0, 0), timeout_s=10.0).requests
    assert all("Connect" in (record.error or "") for record in gone)


def test_no_requests_are_an_empty_phase(fake_server: Callable[..., Any]) -> None:
    assert replay(fake_server().url, (), timeout_s=1.0).requests == ()
