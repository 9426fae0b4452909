"""CPU time of the front, the engine's process and the client: per idle request, and per token.

    python benchmarks/serving_front.py [--json FILE]

A model whose steps cost next to nothing, so that the processes around it are what is measured. CPU
time is what the front takes from a model that has both cores, and a busy machine changes it less
than it changes the time on the clock.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import serving_client
from machine import describe_machine
from serving_arms import OwnServer, start_server
from serving_workload import BenchRequest, write_tiny_model

from quantgate_serve.config import ServerSettings

_IDLE = [BenchRequest([index % 200 + 2] * 16, 1) for index in range(400)]
_LOAD = [BenchRequest([index % 200 + 2] * 16, 100) for index in range(128)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_model(folder / "model")
        settings = ServerSettings(model=folder / "model", device="cpu", prefix_cache=False)
        with start_server(settings, folder / "ready.json") as server:
            _measure(server, _LOAD[:16], stream=True, at_once=True)  # warms every code path
            rows = {
                "one idle request, ms": _measure(server, _IDLE, stream=False, at_once=False),
                "whole answers, ms/token": _measure(server, _LOAD, stream=False, at_once=True),
                "streams, ms/token": _measure(server, _LOAD, stream=True, at_once=True),
            }
    for title, row in rows.items():
        print(title, row)
    if arguments.json is not None:
        report = {"rows": rows, "machine": describe_machine()}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure(
    server: OwnServer, requests: Sequence[BenchRequest], *, stream: bool, at_once: bool
) -> dict[str, float]:
    """Milliseconds of CPU time of each process, per request or with `at_once` per token."""
    front = psutil.Process(server.pid)
    processes = {"front": front, "engine": front.children()[0], "client": psutil.Process()}
    job: dict[str, Any] = {
        "url": server.url,
        "model": server.model_name,
        "stream": stream,
        "requests": [asdict(request) for request in requests],
        # One connection sends one request after another.
        "connections": 0 if at_once else 1,
    }
    before = {name: _cpu_s(process) for name, process in processes.items()}
    answer = asyncio.run(serving_client.run(job))
    count = answer["num_output"] if at_once else len(requests)
    return {
        name: round(1e3 * (_cpu_s(process) - before[name]) / count, 4)
        for name, process in processes.items()
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    sys.exit(main())
