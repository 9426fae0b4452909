"""Ten times more than the server can do, for minutes: who is served, who is refused, who waits.

    python benchmarks/overload.py [--duration S] [--factor F] [--check] [--json FILE]

The HTTP server as a user starts it, and a client in a process of its own that sends at random
times (an open loop: it does not wait for answers) requests of three classes, the interactive ones
with a deadline. `--check` exits with 1 unless

- every request got exactly one answer: 200, 429 with Retry-After, or 504 at its deadline, and the
  server's own counts agree;
- the 95th percentile of the queue wait of admitted interactive requests is within their deadline,
  and nine of ten of them were served in time.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import numpy as np
from machine import describe_machine
from serving_arms import OwnServer, start_server
from serving_workload import VOCAB_SIZE, write_model

from quantgate_serve.config import ServerSettings

CLASSES = {"interactive": 0.5, "normal": 0.2, "bulk": 0.3}
_CAPACITY_REQUESTS = 96
# Of an interactive request, in times that a full batch takes for one.
_DEADLINE_FACTOR = 4.0


def main(argv: list[str] | None = None) -> int:
    """Measure the capacity, overload the server, print, and with --check judge."""
    arguments = _parse(argv)
    if arguments.client:
        print(json.dumps(asyncio.run(_run_client(json.load(sys.stdin)))))
        return 0
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model")
        settings = ServerSettings(model=Path(name) / "model", device="cpu")
        with start_server(settings, Path(name) / "ready.json") as server:
            report = _measure(server, duration_s=arguments.duration, factor=arguments.factor)
    report["machine"] = describe_machine()
    report["missed"] = missed = _missed(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    for line in missed:
        print(f"MISSED {line}")
    return 1 if arguments.check and missed else 0


def _measure(server: OwnServer, *, duration_s: float, factor: float) -> dict[str, Any]:
    base = {"url": server.url, "model": server.model_name}
    alone = _ask(base | {"rate_per_s": None, "count": _CAPACITY_REQUESTS, "seed": 1})
    capacity = _CAPACITY_REQUESTS / alone["duration_s"]
    # All were sent at once, so the median one shared the batch with many others all its life.
    service_s = float(np.median([1e-3 * row["inference_ms"] for row in alone["rows"]]))
    deadline_ms = round(1e3 * _DEADLINE_FACTOR * service_s)
    before = _scrape(server.url)
    flood = _ask(
        base
        | {
            "rate_per_s": factor * capacity,
            "count": round(factor * capacity * duration_s),
            "seed": 2,
            "deadline_ms": deadline_ms,
        }
    )
    after = _scrape(server.url)
    return {
        "capacity_requests_per_s": round(capacity, 2),
        "service_s": round(service_s, 3),
        "offered_requests_per_s": round(len(flood["rows"]) / flood["sending_s"], 2),
        "factor": factor,
        "duration_s": round(flood["duration_s"], 1),
        "deadline_ms": deadline_ms,
        "sent": len(flood["rows"]),
        "largest_send_delay_ms": round(flood["largest_delay_ms"], 1),
        "server_counts": {key: after[key] - before[key] for key in after},
        "classes": {name: _summary(flood["rows"], name) for name in CLASSES},
    }


def _summary(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    mine = [row for row in rows if row["priority"] == name]
    admitted = [row for row in mine if row["status"] in (200, 504)]
    waits = [row["queue_ms"] for row in admitted]
    retries = [row["retry_after_s"] for row in mine if row["status"] == 429]
    return {
        "sent": len(mine),
        "answers": dict(Counter(str(row["status"]) for row in mine)),
        "reasons": dict(Counter(row["code"] for row in mine if row["code"])),
        "admitted": len(admitted),
        "queue_wait_ms": _percentiles(waits),
        "e2e_ms": _percentiles([row["e2e_ms"] for row in mine if row["status"] == 200]),
        "without_retry_after": sum(retry is None for retry in retries),
        "retry_after_s": _percentiles([retry for retry in retries if retry is not None]),
    }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    """None where there is nothing to tell."""
    if not values:
        return None
    return {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 95, 99, 100)}


def _missed(report: dict[str, Any]) -> list[str]:
    missed = []
    for name, found in report["classes"].items():
        other = {status for status in found["answers"] if status not in ("200", "429", "504")}
        if other or sum(found["answers"].values()) != found["sent"]:
            missed.append(f"{name}: answers {found['answers']} to {found['sent']} requests")
        if found["without_retry_after"]:
            missed.append(f"{name}: {found['without_retry_after']} times 429 without Retry-After")
    answered = Counter[str]()
    for found in report["classes"].values():
        answered.update(found["answers"])
    counts = report["server_counts"]
    ended = counts["request_success_total"] + counts["admission_rejections_total"]
    if ended != report["sent"] or counts["admission_rejections_total"] != answered["429"]:
        missed.append(f"the server counts {counts}, the client {dict(answered)}")
    interactive = report["classes"]["interactive"]
    waits = interactive["queue_wait_ms"]
    if waits is None or not waits["p95"] <= report["deadline_ms"]:
        missed.append(
            f"interactive queue wait {waits} ms, wanted p95 <= {report['deadline_ms']} ms"
        )
    served = interactive["answers"].get("200", 0)
    if not served >= 0.9 * interactive["admitted"] or not served:
        missed.append(f"{served} of {interactive['admitted']} admitted interactive were served")
    if not report["offered_requests_per_s"] >= 0.95 * (
        report["factor"] * report["capacity_requests_per_s"]
    ):
        missed.append("the client could not send as fast as asked, so this was not the overload")
    return missed


def _scrape(url: str) -> dict[str, int]:
    """The server's totals of ended and of refused requests."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        text = response.read().decode()
    return {
        name: round(
            sum(
                float(line.split()[-1])
                for line in text.splitlines()
                if line.startswith(f"quantgate_{name}{{")
            )
        )
        for name in ("request_success_total", "admission_rejections_total")
    }


def _ask(job: dict[str, Any]) -> dict[str, Any]:
    """What the client process measured for `job`."""
    done = subprocess.run(
        [sys.executable, __file__, "--client"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the client failed: {done.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


async def _run_client(job: dict[str, Any]) -> dict[str, Any]:
    """Send `count` requests at `rate_per_s`, or all at once where that is None."""
    source = random.Random(job["seed"])
    rows: list[dict[str, Any]] = []
    tasks = []
    largest_delay_s = 0.0
    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        started = perf_counter()
        at_s = 0.0
        for _ in range(job["count"]):
            if job["rate_per_s"] is not None:
                at_s += source.expovariate(job["rate_per_s"])
                pause_s = at_s - (perf_counter() - started)
                if pause_s > 0:
                    await asyncio.sleep(pause_s)
                largest_delay_s = max(largest_delay_s, perf_counter() - started - at_s)
            tasks.append(asyncio.create_task(_send(session, job, source, rows)))
        sending_s = perf_counter() - started
        await asyncio.gather(*tasks)
    return {
        "rows": rows,
        "sending_s": sending_s,
        "duration_s": perf_counter() - started,
        "largest_delay_ms": 1e3 * largest_delay_s,
    }


async def _send(
    session: aiohttp.ClientSession,
    job: dict[str, Any],
    source: random.Random,
    rows: list[dict[str, Any]],
) -> None:
    priority = source.choices(list(CLASSES), list(CLASSES.values()))[0]
    body = {
        "model": job["model"],
        "prompt": [source.randrange(2, VOCAB_SIZE) for _ in range(source.randint(20, 200))],
        "max_tokens": source.randint(8, 64),
        "temperature": 0,
        "ignore_eos": True,
        "priority": priority,
    }
    if priority == "interactive" and "deadline_ms" in job:
        body["deadline_ms"] = job["deadline_ms"]
    started = perf_counter()
    async with session.post(f"{job['url']}/v1/completions", json=body) as response:
        answer = await response.json()
    elapsed_ms = 1e3 * (perf_counter() - started)
    row: dict[str, Any] = {
        "priority": priority,
        "status": response.status,
        "e2e_ms": elapsed_ms,
        # One that expired waited no longer than it lived.
        "queue_ms": elapsed_ms,
        "code": None,
        "retry_after_s": None,
    }
    if response.status == 200:
        timings = answer["timings"]
        row["queue_ms"] = timings["queue_ms"]
        row["inference_ms"] = timings["prefill_ms"] + timings["decode_ms"]
    else:
        row["code"] = answer["error"]["code"]
        if "retry-after" in response.headers:
            row["retry_after_s"] = int(response.headers["retry-after"])
    rows.append(row)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=300.0, help="seconds of sending")
    parser.add_argument("--factor", type=float, default=10.0, help="offered over capacity")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is missed")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
