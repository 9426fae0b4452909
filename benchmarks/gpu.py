"""Decode speed on a GPU: Llama shapes of 1 and 8 billion random weights, each scheme and batch.

    python benchmarks/gpu.py [--shape 1b] [--schemes bf16,int4-nf4] [--concurrency 1,8,32,128]
                             [--limit-s 520] [--json FILE] [--check]
    python benchmarks/gpu.py --device cpu --tiny      (the same code on a toy, to try the script)

All sequences of a row start together with the same prompt length, so that a step's batch is the
concurrency. MBU and MFU set the least bytes and operations of the median decode step against what a
copy and a matrix product reach on this device. An arm that reaches its time limit is measured up to
there; what no time was left for is reported as not run, and `--check` counts that as missed.
"""

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from gpu_arms import Load, NotMeasured, OwnRun, Peers, run_own
from gpu_models import SCHEMES, TINY, SkippedScheme, build_model, unload
from machine import describe_machine

from quantgate_serve.ceilings import measure_ceilings
from quantgate_serve.kernels import read_kernels
from quantgate_serve.model_cost import read_cost
from quantgate_serve.roofline import Ceilings, ModelCost, step_work

OWN, CONTINUOUS, STATIC = "ours", "transformers continuous", "static batch"
_MIN_MBU = 0.75
_MIN_OVER_CONTINUOUS = 5.0
_MIN_INT4_OVER_BF16 = 1.8


@dataclass(frozen=True, slots=True)
class Row:
    """One arm at one concurrency. `reason` is set where there is no number."""

    scheme: str
    concurrency: int
    arm: str
    tok_per_s: float | None = None
    step_ms: float | None = None
    mbu: float | None = None
    mfu: float | None = None
    breakdown_ms: dict[str, float] | None = None
    graph_hits: int | None = None
    reason: str | None = None


def main(argv: list[str] | None = None) -> int:
    """Run, print, and with --check judge."""
    arguments = _parse(argv)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("error: no CUDA device is visible. Use --device cpu --tiny to try it.\n")
        return 2
    started = perf_counter()
    ends = started + arguments.limit_s
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ceilings = measure_ceilings(device, dtype, torch.get_num_threads())
    rows: list[Row] = []
    kernels: dict[str, list[dict[str, Any]]] = {}
    for scheme in arguments.schemes:
        rows += _run_scheme(scheme, arguments, device, dtype, ceilings, ends, kernels)
    missed = find_missed(rows, is_8b=arguments.shape == "8b" and not arguments.tiny)
    report = {
        "shape": "tiny" if arguments.tiny else arguments.shape,
        "rows": [asdict(row) for row in rows],
        "kernels": kernels,
        "ceilings": ceilings._asdict(),
        "machine": describe_machine() | {"device": _device_name(device)},
        "duration_s": round(perf_counter() - started, 1),
        "missed": missed,
    }
    print(_table(rows))
    print(
        f"{report['duration_s']} s on {_device_name(device)}: copies at "
        f"{ceilings.bytes_per_s / 1e9:.0f} GB/s, products at {ceilings.flops_per_s / 1e12:.1f} T/s"
    )
    for line in missed:
        print(f"MISSED {line}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if arguments.check and missed else 0


def _run_scheme(
    scheme: str,
    arguments: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    ends: float,
    kernels: dict[str, list[dict[str, Any]]],
) -> list[Row]:
    shape = TINY if arguments.tiny else arguments.shape
    if perf_counter() > ends:
        return _not_run(scheme, arguments.concurrency, "no time was left")
    try:
        loaded = build_model(shape, scheme, device=device, dtype=dtype)
    except SkippedScheme as error:
        return _not_run(scheme, arguments.concurrency, str(error))
    cost = read_cost(loaded.model, loaded.kv_shape)
    kernels[scheme] = [asdict(kernel) for kernel in read_kernels(loaded.model, device)]
    rows = []
    for concurrency in arguments.concurrency:
        load = Load(concurrency, arguments.prompt, arguments.output, loaded.vocab_size)
        limit_s = min(arguments.arm_limit_s, ends - perf_counter())
        if limit_s <= 0:
            rows += _not_run(scheme, [concurrency], "no time was left")
            continue
        rows.append(_own_row(scheme, load, run_own(loaded, load, limit_s), cost, ceilings))
        peers = Peers(loaded)
        for arm, run in ((CONTINUOUS, peers.run_continuous), (STATIC, peers.run_static)):
            limit_s = min(arguments.arm_limit_s, ends - perf_counter())
            if limit_s <= 0:
                rows.append(Row(scheme, concurrency, arm, reason="no time was left"))
                continue
            result = run(load, limit_s)
            if isinstance(result, NotMeasured):
                rows.append(Row(scheme, concurrency, arm, reason=result.reason))
            else:
                rows.append(Row(scheme, concurrency, arm, tok_per_s=result))
    unload(loaded)
    return rows


def _own_row(
    scheme: str, load: Load, run: OwnRun, cost: ModelCost | None, ceilings: Ceilings
) -> Row:
    mbu = mfu = None
    if cost is not None and run.step_s is not None:
        behind = run.context - 1
        work = step_work(cost, [(behind, 1)] * load.concurrency, num_rows=load.concurrency)
        mbu = work.num_bytes / run.step_s / ceilings.bytes_per_s
        mfu = work.num_flops / run.step_s / ceilings.flops_per_s
    return Row(
        scheme,
        load.concurrency,
        OWN,
        tok_per_s=run.tok_per_s,
        step_ms=None if run.step_s is None else run.step_s * 1e3,
        mbu=mbu,
        mfu=mfu,
        breakdown_ms=run.breakdown_ms,
        graph_hits=run.graph_hits,
        reason=None if run.step_s is not None else "no decode step within the limit",
    )


def _not_run(scheme: str, concurrency: list[int], reason: str) -> list[Row]:
    return [
        Row(scheme, count, arm, reason=reason)
        for count in concurrency
        for arm in (OWN, CONTINUOUS, STATIC)
    ]


def find_missed(rows: list[Row], *, is_8b: bool) -> list[str]:
    """The aims that are not reached; one that was not measured is not reached."""
    found = {(row.scheme, row.concurrency, row.arm): row for row in rows}

    def speed(scheme: str, concurrency: int, arm: str) -> float | None:
        row = found.get((scheme, concurrency, arm))
        return None if row is None else row.tok_per_s

    missed = []
    for concurrency in (1, 8):
        row = found.get(("bf16", concurrency, OWN))
        mbu = None if row is None else row.mbu
        if not is_8b:
            missed.append(f"MBU of BF16 at {concurrency}: an 8 B shape was not run (--shape 8b)")
        elif mbu is None or mbu < _MIN_MBU:
            missed.append(f"MBU of BF16 at {concurrency}: {_said(mbu)}, aim {_MIN_MBU}")
    for name, ours, theirs, aim in (
        (
            "BF16 over transformers' continuous batching at 32",
            speed("bf16", 32, OWN),
            speed("bf16", 32, CONTINUOUS),
            _MIN_OVER_CONTINUOUS,
        ),
        (
            "INT4 over BF16 at 1",
            speed("int4-nf4", 1, OWN),
            speed("bf16", 1, OWN),
            _MIN_INT4_OVER_BF16,
        ),
    ):
        ratio = None if ours is None or not theirs else ours / theirs
        if ratio is None or ratio < aim:
            missed.append(f"{name}: {_said(ratio)}, aim {aim} x")
    return missed


def _said(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _table(rows: list[Row]) -> str:
    lines = [f"{'scheme':<10}{'batch':>6}  {'arm':<25}{'tok/s':>9}{'step':>10}{'MBU':>6}{'MFU':>6}"]
    for row in rows:
        if row.tok_per_s is None:
            numbers = f"  {row.reason}"
        else:
            step = "" if row.step_ms is None else f"{row.step_ms:.2f} ms"
            shares = "".join(f"{'' if v is None else f'{v:.2f}':>6}" for v in (row.mbu, row.mfu))
            numbers = f"{row.tok_per_s:>9.1f}{step:>10}{shares}"
        lines.append(f"{row.scheme:<10}{row.concurrency:>6}  {row.arm:<25}{numbers}")
        if row.breakdown_ms is not None:
            parts = ", ".join(f"{name} {ms:.2f}" for name, ms in row.breakdown_ms.items())
            lines.append(f"{'':<18}ms of a step: {parts}; graph replays {row.graph_hits}")
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return str(torch.cuda.get_device_name(device))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, 1 and 4 at once")
    parser.add_argument("--shape", choices=("1b", "8b"), default="1b")
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(SCHEMES))
    parser.add_argument(
        "--concurrency",
        type=lambda text: [int(part) for part in text.split(",")],
        default=None,
        help="sequences at once (default 1,8,32,128)",
    )
    parser.add_argument("--prompt", type=int, default=None, help="tokens (default 256)")
    parser.add_argument("--output", type=int, default=None, help="tokens (default 128)")
    parser.add_argument("--arm-limit-s", type=float, default=30.0)
    parser.add_argument("--limit-s", type=float, default=520.0, help="of the whole call")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--check", action="store_true", help="exit 1 where an aim is missed")
    arguments = parser.parse_args(argv)
    unknown = [scheme for scheme in arguments.schemes if scheme not in SCHEMES]
    if unknown:
        parser.error(f"--schemes {unknown[0]}: known are {', '.join(SCHEMES)}")
    defaults = ([1, 4], 12, 8) if arguments.tiny else ([1, 8, 32, 128], 256, 128)
    arguments.concurrency = arguments.concurrency or defaults[0]
    arguments.prompt = arguments.prompt or defaults[1]
    arguments.output = arguments.output or defaults[2]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
