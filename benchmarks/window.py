"""Does it pay to hold an idle engine for company? The admission window over bursts of requests.

    python benchmarks/window.py [--seconds S] [--rounds N] [--json FILE]

The demo model in this process. Bursts of 2 to 8 requests arrive within 12 ms every 0.8 s on
average, the same for every window; windows take turns in random order. Beside the latency of the
requests it tells the time that the engine computed, for that is what a window can save.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, perf_counter_ns, sleep
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from machine import describe_machine

import quantgate
from quantgate_serve.config import ServerSettings
from quantgate_serve.engine import Engine
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.startup import build_engine, load_for_serving

WINDOWS_MS = (0.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_MODEL = Path(quantgate.__file__).parent / "demo" / "model"


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    num_prompt: int
    num_output: int


def bursts(seconds: float, *, seed: int) -> list[Arrival]:
    """Arrivals in order."""
    source = random.Random(seed)
    arrivals: list[Arrival] = []
    start_s = 0.1
    while start_s < seconds:
        for _ in range(source.randint(2, 8)):
            arrivals.append(
                Arrival(
                    start_s + source.uniform(0, 0.012),
                    source.randint(20, 80),
                    source.randint(8, 32),
                )
            )
        start_s += source.expovariate(1 / 0.8)
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def run(engine: Engine, arrivals: Sequence[Arrival], *, seed: int) -> dict[str, Any]:
    """Replay `arrivals` in real time; latencies in ms and the seconds that steps took."""
    source = np.random.default_rng(seed)
    pending = list(arrivals)[::-1]
    requests: list[Request] = []
    busy_before = engine.metrics.step_s.sum
    steps_before = sum(engine.metrics.step_s.counts)
    start_ns = perf_counter_ns()
    while pending or engine.has_work:
        now_ns = perf_counter_ns()
        while pending and start_ns + pending[-1].at_s * 1e9 <= now_ns:
            arrival = pending.pop()
            request = Request(
                source.integers(2, 1000, arrival.num_prompt).tolist(),
                SamplingParams(max_tokens=arrival.num_output, ignore_eos=True),
                arrived_ns=start_ns + int(arrival.at_s * 1e9),
            )
            requests.append(request)
            engine.submit([request])
        idle_s = engine.idle_s()
        if idle_s == 0:
            engine.step()
            continue
        until_next_s = (start_ns + pending[-1].at_s * 1e9 - now_ns) / 1e9 if pending else 1.0
        sleep(max(0.0, min(until_next_s, until_next_s if idle_s is None else idle_s)))
    latencies = np.array([(r.finished_ns - r.arrived_ns) / 1e6 for r in requests])
    return {
        "num_requests": len(requests),
        "p50_ms": float(np.percentile(latencies, 50)),
        "p95_ms": float(np.percentile(latencies, 95)),
        "busy_s": engine.metrics.step_s.sum - busy_before,
        "steps": sum(engine.metrics.step_s.counts) - steps_before,
    }


def main(argv: list[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each window")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = ServerSettings(model=_MODEL, device="cpu", prefix_cache=False)
    loaded = load_for_serving(_MODEL, settings)
    engines = {
        window: build_engine(loaded, settings.model_copy(update={"admission_window_ms": window}))
        for window in WINDOWS_MS
    }
    for engine in engines.values():
        engine.warm_up()
    runs: dict[float, list[dict[str, Any]]] = {window: [] for window in WINDOWS_MS}
    started = perf_counter()
    order = random.Random(0)
    # The first run pays for what warming up did not reach; it does not count.
    run(engines[0.0], bursts(arguments.seconds, seed=0), seed=0)
    for index in range(arguments.rounds):
        arrivals = bursts(arguments.seconds, seed=index)
        for window in order.sample(WINDOWS_MS, len(WINDOWS_MS)):
            runs[window].append(run(engines[window], arrivals, seed=index))
    print("window     p50      p95     computing  steps   (median of rounds; ratios to no window)")
    for window, results in runs.items():
        line = [f"{window:4.0f} ms"]
        for key, unit in (("p50_ms", "ms"), ("p95_ms", "ms"), ("busy_s", "s"), ("steps", "")):
            ratio = median(a[key] / b[key] for a, b in zip(results, runs[0.0], strict=True))
            line.append(f"{median(r[key] for r in results):7.1f} {unit} ({ratio:.2f})")
        print("  ".join(line))
    report = {
        "machine": describe_machine(),
        "seconds": perf_counter() - started,
        "runs": {str(window): results for window, results in runs.items()},
    }
    print(report["machine"])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
