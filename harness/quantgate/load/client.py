"""The open-loop client: sends on schedule, and counts latency from the scheduled send time.

A client that waits for answers before it sends hides the server's queueing (coordinated omission).
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from quantgate.load.workload import TimedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What became of one request; times in milliseconds from the start of its phase."""

    index: int
    scheduled_ms: float
    sent_ms: float
    first_token_ms: float | None
    done_ms: float
    prompt_tokens: int
    output_tokens: int
    """Tokens the server really produced."""
    queue_ms: float | None
    error: str | None

    @property
    def e2e_ms(self) -> float:
        """From the scheduled send time to the last token."""
        return self.done_ms - self.scheduled_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRecord:
    """One replay of a list of requests, with what shows whether it may be believed."""

    requests: tuple[RequestRecord, ...]
    duration_ms: float
    client_cpu_share: float
    """CPU time of this process over the duration: near 1, the client is the bottleneck."""


def replay(url: str, requests: Sequence[TimedRequest], *, timeout_s: float) -> PhaseRecord:
    """Sends each request at its time, whether or not earlier ones were answered."""
    return asyncio.run(_replay(url, requests, timeout_s))


async def _replay(url: str, requests: Sequence[TimedRequest], timeout_s: float) -> PhaseRecord:
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        cpu_before, started_ns = _cpu_s(), time.perf_counter_ns()
        sends = [_send(session, url, i, r, started_ns) for i, r in enumerate(requests)]
        records = await asyncio.gather(*sends)
        duration_ms = _ms_since(started_ns)
    share = (_cpu_s() - cpu_before) / (duration_ms / 1e3)
    return PhaseRecord(requests=tuple(records), duration_ms=duration_ms, client_cpu_share=share)


async def _send(
    session: aiohttp.ClientSession, url: str, index: int, request: TimedRequest, started_ns: int
) -> RequestRecord:
    scheduled_ms = request.at_s * 1e3
    await asyncio.sleep(max(0.0, (scheduled_ms - _ms_since(started_ns)) / 1e3))
    body = {
        "prompt": list(request.prompt_ids),
        "max_tokens": request.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    sent_ms = _ms_since(started_ns)
    first_ms: float | None = None
    queue_ms: float | None = None
    output_tokens, error = 0, None
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            text = await response.text()
        if response.status == 200:
            payload = json.loads(text)
            output_tokens = int(payload["usage"]["completion_tokens"])
            timings = payload.get("timings") or {}
            queue_ms = timings.get("queue_ms")
            if timings.get("ttft_ms") is not None:
                first_ms = sent_ms + float(timings["ttft_ms"])
        else:
            error = f"HTTP {response.status}: {text[:200]}"
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    if error is None and output_tokens != request.output_tokens:
        error = f"{output_tokens} output tokens; {request.output_tokens} were asked for"
    return RequestRecord(
        index=index,
        scheduled_ms=scheduled_ms,
        sent_ms=sent_ms,
        first_token_ms=first_ms,
        done_ms=_ms_since(started_ns),
        prompt_tokens=len(request.prompt_ids),
        output_tokens=output_tokens,
        queue_ms=queue_ms,
        error=error,
    )


def _ms_since(started_ns: int) -> float:
    return (time.perf_counter_ns() - started_ns) / 1e6


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
