"""The HTTP client of the serving benchmark: its own process, so that it shares no GIL.

Reads a job from the first line of standard input and writes what it measured to standard output,
both as JSON. A job with requests is sent at once. One without is asked for its requests line by
line, and each one's answer is a line.
"""

import asyncio
import json
import sys
from time import perf_counter
from typing import Any

import aiohttp

# More than the last two events of a stream take.
_TAIL_BYTES = 4096


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """`job`: url, model, stream, requests [{prompt, num_output}]."""
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=job.get("connections", 0))
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        # Opens the connection and the code paths; not measured.
        await _send(session, job, {"prompt": [1, 2, 3], "num_output": 2})
        started = perf_counter()
        answers = await asyncio.gather(
            *(_send(session, job, request) for request in job["requests"])
        )
        duration_s = perf_counter() - started
    return {
        "duration_s": duration_s,
        "latencies_s": [latency for latency, _ in answers],
        "num_output": sum(answer["usage"]["completion_tokens"] for _, answer in answers),
    }


async def run_in_turn(job: dict[str, Any]) -> None:
    """`job`: url, model, stream. Each line of standard input is a request."""
    async with aiohttp.ClientSession() as session:
        # Nothing else is under way, so that the loop may as well stand still.
        for line in iter(sys.stdin.readline, ""):
            latency_s, answer = await _send(session, job, json.loads(line))
            found = {"latency_s": latency_s, "timings": answer.get("timings")}
            print(json.dumps(found), flush=True)


async def _send(
    session: aiohttp.ClientSession, job: dict[str, Any], request: dict[str, Any]
) -> tuple[float, dict[str, Any]]:
    """Seconds, and the answer; of a stream the event that has the usage."""
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
        answer = await _read_stream(response) if job["stream"] else await response.json()
    return perf_counter() - started, answer


async def _read_stream(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The event with the usage, which is the last. The others are received and not parsed."""
    tail = b""
    async for part in response.content.iter_any():
        tail = (tail + part)[-_TAIL_BYTES:]
    for line in tail.splitlines():
        if line.startswith(b"data: {") and b'"usage":{' in line.replace(b" ", b""):
            event: dict[str, Any] = json.loads(line[6:])
            return event
    raise RuntimeError("the stream ended without usage")


if __name__ == "__main__":
    JOB = json.loads(sys.stdin.readline())
    if "requests" in JOB:
        print(json.dumps(asyncio.run(run(JOB))))
    else:
        asyncio.run(run_in_turn(JOB))
