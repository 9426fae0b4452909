"""Serving speed on this machine: every arm in one run, same requests, same weights.

    python benchmarks/serving.py [--quick] [--check] [--json FILE] [--soak [N]]

Only tokens that were asked for count. Arms run in rounds, each round in the reverse order of the
one before, and a ratio is the median over rounds of the ratio within a round: what slows the
machine for a minute slows both sides. `--check` exits with 1 and names each figure that is missed.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

# What the server sets for itself at its start, for the arms in this process too.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from machine import describe_machine
from serving_arms import (
    ArmResult,
    OwnEngine,
    load_reference,
    run_continuous,
    run_static,
    start_server,
)
from serving_floor import Linears, best_gemm_rate, cold_bytes_per_s, kv_bytes, measure_floor
from serving_idle import measure_idle
from serving_soak import DEFAULT_REQUESTS, run_soak
from serving_workload import BenchRequest, num_output, workload_a, workload_b, write_model

from quantgate_serve.config import ServerSettings

STATIC, ONE, CONTINUOUS = "static batches of 16", "one at a time", "transformers continuous"
OWN, HTTP, STREAM, FLOOR = "our engine", "our HTTP server", "our HTTP server, SSE", "compute floor"
# Not a target's: what FP32 keys and values leave to be reached of the floor.
FLOOR_AND_KV = "compute floor plus KV bytes"
# Nor this: with decode steps at their median, where the floor takes the fastest.
TYPICAL_FLOOR = "compute floor of median steps"
# Sizes of continuous batching to try on a part of each workload; the best one runs the whole.
_CONTINUOUS_SIZES = ((64, 512), (64, 256), (128, 1024))

_FLOOR_ROUNDS = 9


@dataclass(frozen=True, slots=True)
class Target:
    """`ours / theirs` must be at least `minimum` on a workload."""

    ours: str
    theirs: str
    minimum: dict[str, float]


TARGETS = (
    Target(OWN, STATIC, {"A": 2.2, "B": 5.0}),
    Target(OWN, CONTINUOUS, {"A": 2.0, "B": 2.0}),
    Target(OWN, FLOOR, {"A": 0.85, "B": 0.85}),
    Target(HTTP, OWN, {"A": 0.90, "B": 0.90}),
)


@dataclass(slots=True)
class Figures:
    """All runs of a workload, by arm, and what is known about them."""

    requests: list[BenchRequest]
    runs: dict[str, list[ArmResult]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def ratio(self, ours: str, theirs: str) -> float:
        """The median over rounds. An arm with fewer rounds is paired with its last one."""
        mine, other = self.runs[ours], self.runs[theirs]
        rounds = range(max(len(mine), len(other)))
        return median(
            mine[min(i, len(mine) - 1)].tok_per_s / other[min(i, len(other) - 1)].tok_per_s
            for i in rounds
        )


def main(argv: list[str] | None = None) -> int:
    """Run, print, and with --check judge."""
    arguments = _parse(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = perf_counter()
    with tempfile.TemporaryDirectory() as name:
        if arguments.soak is not None:
            report, missed = run_soak(Path(name), count=arguments.soak)
        elif arguments.floor is not None:
            report, missed = run_floor(Path(name), rounds=arguments.floor)
        else:
            report, missed = run_speed(Path(name), quick=arguments.quick)
    report["machine"] = describe_machine()
    report["duration_s"] = round(perf_counter() - started, 1)
    report["missed"] = missed
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{report['duration_s']:.0f} s on {report['machine']['cpu']}, {report['machine']}")
    for line in missed:
        print(f"MISSED {line}")
    return 1 if arguments.check and missed else 0


def run_speed(folder: Path, *, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """All arms over both workloads; the report, and the figures that are missed."""
    write_model(folder / "model")
    settings = ServerSettings(model=folder / "model", device="cpu", prefix_cache=False)
    counts = {"A": 64, "B": 48} if quick else {"A": 256, "B": 192}
    workloads = {
        "A": Figures(workload_a(counts["A"])),
        "B": Figures(workload_b(counts["B"])),
    }
    reference = load_reference(folder / "model")
    engine = OwnEngine(settings)
    linears = Linears(reference)
    with start_server(settings, folder / "ready.json") as server:
        for figures in workloads.values():
            _run_rounds(figures, reference, engine, server, linears, quick=quick)
        idle = measure_idle(engine, server)
    print(_table(workloads, idle))
    missed = _missed(workloads, idle)
    report = {
        "quick": quick,
        "workloads": {name: _to_json(figures) for name, figures in workloads.items()},
        "idle": idle,
    }
    return report, missed


def run_floor(folder: Path, *, rounds: int) -> tuple[dict[str, Any], list[str]]:
    """Our engine and the floor alone, a run of each in turn: what slows the machine slows both."""
    write_model(folder / "model")
    engine = OwnEngine(ServerSettings(model=folder / "model", device="cpu", prefix_cache=False))
    linears = Linears(load_reference(folder / "model"))
    report: dict[str, Any] = {}
    missed = []
    (target,) = [target for target in TARGETS if target.theirs == FLOOR]
    for name, requests in (("A", workload_a(256)), ("B", workload_b(192))):
        figures = Figures(requests)
        for index in range(rounds):
            arms = {FLOOR: lambda f=figures: _floor(f, engine, linears)}
            arms[OWN] = lambda f=figures: engine.run(f.requests)
            for arm in arms if index % 2 == 0 else reversed(arms):
                figures.runs.setdefault(arm, []).append(arms[arm]())
        pairs = zip(figures.runs[OWN], figures.runs[FLOOR], strict=True)
        ratios = sorted(mine.tok_per_s / floor.tok_per_s for mine, floor in pairs)
        ratio, least = median(ratios), target.minimum[name]
        report[name] = {
            "ratios": [round(found, 3) for found in ratios],
            "tok_per_s": {
                arm: [round(run.tok_per_s, 1) for run in runs] for arm, runs in figures.runs.items()
            },
            "notes": figures.notes,
        }
        print(
            f"workload {name}: our engine / compute floor {ratio:.3f}, {ratios[0]:.3f} to "
            f"{ratios[-1]:.3f} in {rounds} rounds (>= {least}); of median steps "
            f"{figures.ratio(OWN, TYPICAL_FLOOR):.3f}"
        )
        if not ratio >= least:
            missed.append(f"workload {name}: the engine is {ratio:.3f} of the floor, not {least}")
    return report, missed


def _run_rounds(
    figures: Figures,
    reference: Any,
    engine: OwnEngine,
    server: Any,
    linears: Linears,
    *,
    quick: bool,
) -> None:
    requests = figures.requests
    sizes = _best_sizes(reference, requests[:: 4 if quick else 6], quick=quick)
    figures.notes["continuous"] = dict(zip(("num_blocks", "max_batch_tokens"), sizes, strict=True))
    sample = requests[: 4 if quick else 16]

    slow: dict[str, Callable[[], ArmResult]] = {
        STATIC: lambda: run_static(reference, requests, batch_size=16),
        ONE: lambda: run_static(reference, sample, batch_size=1),
        CONTINUOUS: lambda: run_continuous(
            reference, requests, num_blocks=sizes[0], max_batch_tokens=sizes[1]
        ),
    }
    fast: dict[str, Callable[[], ArmResult]] = {
        FLOOR: lambda: _floor(figures, engine, linears),
        OWN: lambda: engine.run(requests),
        HTTP: lambda: server.run(requests, stream=False),
        STREAM: lambda: server.run(requests, stream=True),
    }
    rounds = [slow | fast] if quick else [slow | fast, slow | fast, fast, fast]
    for index, arms in enumerate(rounds):
        names = list(arms) if index % 2 == 0 else list(reversed(arms))
        for name in names:
            result = arms[name]()
            figures.runs.setdefault(name, []).append(result)
            print(f"  {name}: {result.tok_per_s:.0f} tok/s", file=sys.stderr, flush=True)
    figures.notes["one at a time"] = f"{len(sample)} requests"
    figures.notes["same_tokens_as_static"] = _share_equal(figures, OWN, STATIC)
    figures.notes["continuous_same_tokens_as_static"] = _share_equal(figures, CONTINUOUS, STATIC)


def _floor(figures: Figures, engine: OwnEngine, linears: Linears) -> ArmResult:
    """The compute floor at the mean batch of the engine's last run."""
    requests = figures.requests
    latest = figures.runs[OWN][-1] if OWN in figures.runs else engine.run(requests)
    found = measure_floor(
        linears, requests, mean_batch=latest.mean_batch or 1.0, gemm=best_gemm_rate(linears)
    )
    figures.notes["floor"] = {
        "gemm_gflop_per_s": round(found.gemm_flop_per_s / 1e9, 1),
        "mean_batch": round(found.mean_batch, 1),
        "decode_step_ms": round(found.decode_step_s * 1e3, 3),
        "median_decode_step_ms": round(found.typical_decode_step_s * 1e3, 3),
        "nn_linear_decode_step_ms": round(found.default_decode_step_s * 1e3, 3),
    }
    num_bytes = kv_bytes(requests, bytes_per_token=engine.loaded.kv_shape.bytes_per_token)
    bandwidth = cold_bytes_per_s()
    figures.notes["kv"] = {
        "decode_gb": round(num_bytes / 1e9, 1),
        "cold_gb_per_s": round(bandwidth / 1e9, 1),
        "share_of_floor": round(num_bytes / bandwidth / found.duration_s, 3),
    }
    figures.runs.setdefault(FLOOR_AND_KV, []).append(
        ArmResult(num_output(requests), found.duration_s + num_bytes / bandwidth)
    )
    figures.runs.setdefault(TYPICAL_FLOOR, []).append(
        ArmResult(num_output(requests), found.typical_s)
    )
    return ArmResult(num_output(requests), found.duration_s)


def _best_sizes(reference: Any, requests: list[BenchRequest], *, quick: bool) -> tuple[int, int]:
    """Which of the sizes makes continuous batching fastest on a part of the workload."""
    if quick:
        return _CONTINUOUS_SIZES[0]
    speeds = {
        sizes: run_continuous(
            reference, requests, num_blocks=sizes[0], max_batch_tokens=sizes[1]
        ).tok_per_s
        for sizes in _CONTINUOUS_SIZES
    }
    return max(speeds, key=lambda sizes: speeds[sizes])


def _share_equal(figures: Figures, ours: str, theirs: str) -> str:
    mine, other = figures.runs[ours][-1].outputs, figures.runs[theirs][-1].outputs
    if mine is None or other is None:
        return "not compared"
    equal = sum(a == b for a, b in zip(mine, other, strict=True))
    return f"{equal} of {len(other)}"


def _table(workloads: dict[str, Figures], idle: dict[str, Any]) -> str:
    lines = []
    for name, figures in workloads.items():
        count = len(figures.requests)
        lines.append(f"workload {name}: {count} requests, {num_output(figures.requests)} tokens")
        for arm, runs in figures.runs.items():
            speeds = sorted(run.tok_per_s for run in runs)
            spread = f"{speeds[0]:7.0f} - {speeds[-1]:.0f}" if len(speeds) > 1 else ""
            lines.append(f"  {arm:28s} {median(speeds):8.0f} tok/s  {spread}")
        for target in TARGETS:
            ratio, least = figures.ratio(target.ours, target.theirs), target.minimum[name]
            mark = "ok" if ratio >= least else "MISSED"
            lines.append(
                f"  {target.ours} / {target.theirs:26s} {ratio:5.2f}   (>= {least})  {mark}"
            )
        lines.append(f"  {STREAM} / {OWN}: {figures.ratio(STREAM, OWN):.2f}")
        for floor in (FLOOR_AND_KV, TYPICAL_FLOOR):
            lines.append(f"  {OWN} / {floor}: {figures.ratio(OWN, floor):.2f}")
        lines += [f"  {key}: {value}" for key, value in figures.notes.items()]
    lines.append(f"one idle request: {idle}")
    return "\n".join(lines)


def _missed(workloads: dict[str, Figures], idle: dict[str, Any]) -> list[str]:
    missed = [
        f"workload {name}: {target.ours} / {target.theirs} is "
        f"{figures.ratio(target.ours, target.theirs):.2f}, wanted >= {target.minimum[name]}"
        for name, figures in workloads.items()
        for target in TARGETS
        if not figures.ratio(target.ours, target.theirs) >= target.minimum[name]
    ]
    if not idle["overhead_ms"] <= idle["target_ms"]:
        missed.append(
            f"HTTP adds {idle['overhead_ms']} ms to an idle request, "
            f"wanted <= {idle['target_ms']} ms"
        )
    return missed


def _to_json(figures: Figures) -> dict[str, Any]:
    return {
        "num_requests": len(figures.requests),
        "num_output": num_output(figures.requests),
        "tok_per_s": {
            name: [round(run.tok_per_s, 1) for run in runs] for name, runs in figures.runs.items()
        },
        "ratios": {
            f"{ours} / {theirs}": round(figures.ratio(ours, theirs), 3)
            for ours, theirs in [
                *((t.ours, t.theirs) for t in TARGETS),
                *((OWN, floor) for floor in (FLOOR_AND_KV, TYPICAL_FLOOR)),
            ]
        },
        "notes": figures.notes,
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests, one round")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is missed")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument(
        "--soak",
        type=int,
        nargs="?",
        const=DEFAULT_REQUESTS,
        help=f"instead: memory over this many requests (default {DEFAULT_REQUESTS})",
    )
    parser.add_argument(
        "--floor",
        type=int,
        nargs="?",
        const=_FLOOR_ROUNDS,
        metavar="ROUNDS",
        help=f"instead: our engine and the compute floor alone (default {_FLOOR_ROUNDS} rounds)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
