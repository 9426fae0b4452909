"""The HTTP client of the serving benchmark: its own process, so that it shares no GIL.

Reads a job from standard input, sends every request at once (or one after another), and writes
what it measured to standard output. Jobs and answers are JSON.
"""

import asyncio
import json
import sys
from time import perf_counter
from typing import Any

import aiohttp


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """`job`: url, model, stream, sequential, requests [{prompt, num_output}]."""
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=job.get("connections", 0))
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        # Opens the connection and the code paths; not measured.
        await _send(session, job, {"prompt": [1, 2, 3], "num_output": 2})
        started = perf_counter()
        if job["sequential"]:
            answers = [await _send(session, job, request) for request in job["requests"]]
        else:
            answers = await asyncio.gather(
                *(_send(session, job, request) for request in job["requests"])
            )
        duration_s = perf_counter() - started
    return {
        "duration_s": duration_s,
        "latencies_s": [latency for latency, _ in answers],
        "num_output": sum(count for _, count in answers),
    }


async def _send(
    session: aiohttp.ClientSession, job: dict[str, Any], request: dict[str, Any]
) -> tuple[float, int]:
    """Seconds, and the tokens that the server says it produced."""
    body = {
        "model": job["model"],
        "prompt": request["prompt"],
        "max_tokens": request["num_output"],
        "temperature": 0,
        "ignore_eos": True,
        "stream": job["stream"],
    }
    if job["stream"]:
        body["stream_options"] = {"include_usage": True}
    started = perf_counter()
    async with session.post(f"{job['url']}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {await response.text()}")
        usage = await _read_stream(response) if job["stream"] else (await response.json())["usage"]
    return perf_counter() - started, usage["completion_tokens"]


async def _read_stream(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The usage in a stream's last event. Other events are read and not parsed."""
    usage = None
    async for line in response.content:
        if line.startswith(b"data: {") and b'"usage":{' in line.replace(b" ", b""):
            usage = json.loads(line[6:])["usage"]
    if usage is None:
        raise RuntimeError("the stream ended without usage")
    return usage


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))))
