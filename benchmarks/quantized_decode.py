"""Tokens per second of decode steps by scheme and batch, beside each scheme without its kernels.

`python benchmarks/quantized_decode.py NAME=FOLDER ...`, one thread, CPU time of that thread, so
that what else runs on the machine shows only in its caches. All arms take turns in one process.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import thread_time
from unittest.mock import patch

import torch
from machine import describe_machine

from quantgate_serve import coded, fused_int8
from quantgate_serve.config import ServerSettings
from quantgate_serve.engine import Engine
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.startup import build_engine, load_for_serving

_BATCHES = (1, 4, 8, 16, 32)
_PROMPT_TOKENS = 32
_STEPS = 8
_ROUNDS = 5


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="NAME=FOLDER of a variant")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--batches", type=int, nargs="+", default=_BATCHES)
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    engines = {}
    for model in options.models:
        name, _, folder = model.partition("=")
        engines[name] = _build(Path(folder))
        with _without_fused():
            engine = _build(Path(folder))
        if engine.metrics.now.kernel_linears != engines[name].metrics.now.kernel_linears:
            engines[f"{name}, without"] = engine
    best: dict[str, dict[int, float]] = {name: {} for name in engines}
    for _ in range(options.rounds):
        for batch in options.batches:
            for name, engine in engines.items():
                rate = _rate(engine, batch)
                best[name][batch] = max(best[name].get(batch, 0.0), rate)
    print(json.dumps(describe_machine()))
    print("| batch |", " | ".join(map(str, options.batches)), "|")
    for name, rates in best.items():
        print(f"| {name} |", " | ".join(f"{rate:,.0f}" for rate in rates.values()), "|")


def _build(folder: Path) -> Engine:
    settings = ServerSettings(
        model=folder,
        device="cpu",
        kv_tokens=8192,
        max_batch_size=max(_BATCHES),
        max_batched_tokens=2048,
        prefix_cache=False,
    )
    return build_engine(load_for_serving(folder, settings), settings)


@contextmanager
def _without_fused() -> Iterator[None]:
    """Inside, quantized Linears load as they were written or by torch alone."""
    with patch.object(coded, "replace_all"), patch.object(fused_int8, "fuse_all"):
        yield


def _rate(engine: Engine, batch: int) -> float:
    """Tokens per second of CPU time of decode steps at `batch`, prompts done before."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(5, 300, (batch, _PROMPT_TOKENS), generator=generator)
    params = SamplingParams(max_tokens=_STEPS + 6, ignore_eos=True)
    engine.submit([Request(row, params) for row in ids.tolist()])
    for _ in range(4):  # prompts, and the first decodes
        engine.step()
    started = thread_time()
    for _ in range(_STEPS):
        engine.step()
    seconds = thread_time() - started
    while engine.has_work:
        engine.step()
    return batch * _STEPS / seconds


if __name__ == "__main__":
    main()
