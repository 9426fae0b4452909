"""What HTTP, queue and the second process add to one request on an idle server.

    python benchmarks/serving_idle.py [--rounds N] [--json FILE] [--check]

The same request in this process and over HTTP in turn: what slows the machine for a second slows
both. It also tells where the time goes: in the queue, in the prompt, in the other tokens, and in
the rest, which is HTTP on both ends and the way through the front. Part of benchmarks/serving.py.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

# What the server sets for itself at its start, for the engine in this process too.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from machine import describe_machine
from serving_arms import OwnEngine, OwnServer, start_server
from serving_workload import BenchRequest, write_model

from quantgate_serve.config import ServerSettings

MAX_OVERHEAD_MS = 3.0
_PHASES = ("queue_ms", "prefill_ms", "decode_ms")


def measure_idle(engine: OwnEngine, server: OwnServer, *, rounds: int = 40) -> dict[str, Any]:
    """Medians in milliseconds over `rounds` requests of 16 tokens and 8 more."""
    requests = [BenchRequest([index + 2] * 16, 8) for index in range(rounds)]
    inside = engine.one_by_one()
    rows: list[dict[str, float]] = []
    with server.one_by_one() as outside:
        outside(requests[0])  # opens the connection and the code paths
        inside(requests[0])
        for index, request in enumerate(requests):
            row: dict[str, float] = {}
            for arm in ("in_process", "http") if index % 2 == 0 else ("http", "in_process"):
                found = inside(request) if arm == "in_process" else outside(request)
                row[f"{arm}_ms"] = found["latency_s"] * 1e3
                row |= {f"{arm}_{name}": found["timings"][name] for name in _PHASES}
            rows.append(row)
    for row in rows:
        row["overhead_ms"] = row["http_ms"] - row["in_process_ms"]
        row["http_rest_ms"] = row["http_ms"] - sum(row[f"http_{name}"] for name in _PHASES)
    figures = {name: round(median(row[name] for row in rows), 2) for name in rows[0]}
    return figures | {"rounds": rounds, "target_ms": MAX_OVERHEAD_MS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and with --check judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the aim is missed")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        settings = ServerSettings(model=folder / "model", device="cpu", prefix_cache=False)
        engine = OwnEngine(settings)
        with start_server(settings, folder / "ready.json") as server:
            figures = measure_idle(engine, server, rounds=arguments.rounds)
    report = figures | {"machine": describe_machine()}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for key, value in report.items():
        print(f"{key}: {value}")
    missed = not figures["overhead_ms"] <= MAX_OVERHEAD_MS
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
