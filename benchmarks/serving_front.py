"""CPU time of the front, the engine's process and the client: per idle request, and per token.

    python benchmarks/serving_front.py [--json FILE]

First a model whose steps cost next to nothing, so that the processes around it are what is
measured; then the 20 M-parameter Llama of benchmarks/serving.py on one thread, beside the same
engine in this process. CPU time is what the front takes from a model that has both cores, and a
busy machine changes it less than it changes the time on the clock.
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
from statistics import median
from time import process_time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import serving_client
import torch
from machine import describe_machine
from serving_arms import OwnEngine, OwnServer, start_server
from serving_workload import (
    BenchRequest,
    workload_b,
    write_model,
    write_tiny_model,
)

from quantgate_serve.config import ServerSettings

_IDLE = [BenchRequest([index % 200 + 2] * 16, 1) for index in range(400)]
_LOAD = [BenchRequest([index % 200 + 2] * 16, 100) for index in range(128)]
_MODEL_IDLE = [BenchRequest([index + 2] * 16, 1) for index in range(200)]
_MODEL_LOAD = workload_b(24)
_ROUNDS = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        rows = _measure_tiny(Path(name)) | _measure_model(Path(name))
    for title, row in rows.items():
        print(title, row)
    if arguments.json is not None:
        report = {"rows": rows, "machine": describe_machine()}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure_tiny(folder: Path) -> dict[str, dict[str, float]]:
    write_tiny_model(folder / "tiny")
    settings = ServerSettings(model=folder / "tiny", device="cpu", prefix_cache=False)
    with start_server(settings, folder / "tiny.json") as server:
        _measure(server, _LOAD[:16], stream=True, at_once=True)  # warms every code path
        return {
            "one idle request, ms": _measure(server, _IDLE, stream=False, at_once=False),
            "whole answers, ms/token": _measure(server, _LOAD, stream=False, at_once=True),
            "streams, ms/token": _measure(server, _LOAD, stream=True, at_once=True),
        }


def _measure_model(folder: Path) -> dict[str, dict[str, float]]:
    """Medians over rounds, in each of which the server and the engine in process take turns."""
    write_model(folder / "model")
    settings = ServerSettings(model=folder / "model", device="cpu", prefix_cache=False, threads=1)
    torch.set_num_threads(1)
    engine = OwnEngine(settings)
    rounds = []
    with start_server(settings, folder / "model.json") as server:
        _measure(server, _MODEL_LOAD, stream=True, at_once=True)
        for _ in range(_ROUNDS):
            idle, load = _in_process_idle(engine), _in_process_load(engine)
            rounds.append(
                {
                    "model: one idle request, ms": idle
                    | _measure(server, _MODEL_IDLE, stream=False, at_once=False),
                    "model: whole answers, ms/token": load
                    | _measure(server, _MODEL_LOAD, stream=False, at_once=True),
                    "model: streams, ms/token": load
                    | _measure(server, _MODEL_LOAD, stream=True, at_once=True),
                }
            )
    return {
        title: {name: round(median(found[title][name] for found in rounds), 4) for name in row}
        for title, row in rounds[0].items()
    }


def _in_process_idle(engine: OwnEngine) -> dict[str, float]:
    ask = engine.one_by_one()
    ask(_MODEL_IDLE[0])
    started = process_time()
    for request in _MODEL_IDLE:
        ask(request)
    return {"engine in process": 1e3 * (process_time() - started) / len(_MODEL_IDLE)}


def _in_process_load(engine: OwnEngine) -> dict[str, float]:
    result = engine.run(_MODEL_LOAD)
    assert result.cpu_s is not None
    return {"engine in process": 1e3 * result.cpu_s / result.num_tokens}


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
