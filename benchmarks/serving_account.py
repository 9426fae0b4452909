"""Where a step's time goes: the parts of our engine's steps beside the Linears of the same rows.

    python benchmarks/serving_account.py [--threads N] [--requests N]

One thread is timed by its CPU time, more by the wall's. The model is accounted for by decoder.c
itself, everything else around the calls that the engine makes.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

# What the server sets for itself at its start.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import serving_floor
import torch
from machine import describe_machine
from serving_arms import OwnEngine, load_reference
from serving_floor import Linears
from serving_workload import BenchRequest, workload_a, workload_b, write_model

from quantgate_serve import native_runner
from quantgate_serve.config import ServerSettings
from quantgate_serve.engine import Engine
from quantgate_serve.native.decoder import PARTS, NativeDecoder
from quantgate_serve.native_runner import NativeRunner
from quantgate_serve.scheduler import Scheduler

LOGITS = PARTS[-1]
AROUND, SAMPLING = "around the call", "sampling"
PLANNING, INPUTS, REPORTS = "planning", "inputs", "counts and reports"
ALL_PARTS = (*PARTS, AROUND, SAMPLING, PLANNING, INPUTS, REPORTS)
# Rows at which the Linears are timed alone; between two of them time is taken as linear.
_ROWS = (1, 2, 4, 8, 14, 16, 24, 28, 32, 48, 64, 96, 128, 256, 512)

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step: its tokens, rows of logits, whether it only decodes, and seconds by part."""

    tokens: int
    rows: int
    is_decode: bool
    parts: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())


class Account:
    """The steps of a run; a function that is `timed` counts its own time as a part's."""

    def __init__(self, decoder: NativeDecoder, clock: Clock) -> None:
        self.steps: list[StepTimes] = []
        self._decoder = decoder
        self._clock = clock
        # Seconds of the timed calls inside each timed call that is under way.
        self._inner: list[float] = []
        self._now: dict[str, float] = {}
        self._shape = (0, 0, True)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            started = self._clock()
            try:
                return function(*arguments, **named)
            finally:
                elapsed = self._clock() - started
                self._now[part] = self._now.get(part, 0.0) + elapsed - self._inner.pop()
                if self._inner:
                    self._inner[-1] += elapsed

        return call

    def step(self, *arguments: Any) -> Any:
        """Engine.step, a line of the account."""
        self._now, self._shape = {}, (0, 0, True)
        result = self.timed(REPORTS, _STEP)(*arguments)
        tokens, rows, is_decode = self._shape
        if tokens:
            self.steps.append(StepTimes(tokens, rows, is_decode, self._now))
        return result

    def decode(self, *arguments: Any) -> Any:
        """NativeDecoder.compute: what decoder.c counted is taken out of it."""
        _, _, ids, chunks, _, rows = arguments
        self._shape = (len(ids), len(rows), all(length == 1 for length in chunks[2::3]))
        spent = torch.zeros(len(PARTS), dtype=torch.int64)
        self._decoder.spent_ns = spent
        result = self.timed(AROUND, _COMPUTE)(*arguments)
        seconds = (spent.double() / 1e9).tolist()
        self._now |= dict(zip(PARTS, seconds, strict=True))
        self._now[AROUND] -= sum(seconds)
        return result


_STEP, _COMPUTE = Engine.step, NativeDecoder.compute


def measure_account(engine: OwnEngine, requests: Sequence[BenchRequest], clock: Clock) -> Account:
    """Run `requests` once to warm up and once to account for each step.

    Raises:
        TypeError: the engine's model is not computed by decoder.c.
    """
    decoder = engine.loaded.model
    if not isinstance(decoder, NativeDecoder):
        raise TypeError(f"only a NativeDecoder accounts for its layers, not {type(decoder)}")
    engine.run(requests)
    account = Account(decoder, clock)
    with _watched(account):
        engine.run(requests)
    decoder.spent_ns = None
    return account


@contextmanager
def _watched(account: Account) -> Iterator[None]:
    def compute(*arguments: Any) -> Any:
        return account.decode(*arguments)

    def step(*arguments: Any) -> Any:
        return account.step(*arguments)

    parts: list[tuple[Any, str, Any]] = [
        (Engine, "step", step),
        (NativeDecoder, "compute", compute),
        (NativeRunner, "launch", account.timed(INPUTS, NativeRunner.launch)),
        (native_runner, "_results", account.timed(SAMPLING, native_runner._results)),
        (Engine, "_schedule", account.timed(PLANNING, Engine._schedule)),
        (Scheduler, "commit", account.timed(PLANNING, Scheduler.commit)),
        (Scheduler, "finish", account.timed(PLANNING, Scheduler.finish)),
    ]
    with ExitStack() as stack:
        for owner, name, function in parts:
            stack.enter_context(patch.object(owner, name, function))
        yield


class Alone:
    """The Linears alone, each of the layers' over a step's tokens and the head over its rows."""

    @torch.inference_mode()
    def __init__(self, linears: Linears) -> None:
        layers = [min(linears.step_s(rows, with_head=False).values()) for rows in _ROWS]
        both = [min(linears.step_s(rows, with_head=True).values()) for rows in _ROWS]
        self._layers, self._head = layers, np.maximum(0, np.subtract(both, layers))

    def seconds(self, steps: Sequence[StepTimes]) -> float:
        """For all of `steps`."""
        tokens, rows = [step.tokens for step in steps], [step.rows for step in steps]
        layers = np.interp(tokens, _ROWS, self._layers).sum()
        return float(layers + np.interp(rows, _ROWS, self._head).sum())


def table(steps: Sequence[StepTimes], alone: float) -> list[str]:
    """Milliseconds of a step by part, and the share of the time."""
    total, count = sum(step.total_s for step in steps), len(steps)
    tokens = sum(step.tokens for step in steps) / count
    lines = [f"{count} steps of {tokens:.1f} tokens, {total / count * 1e3:.2f} ms each"]
    for part in ALL_PARTS:
        seconds = sum(step.parts.get(part, 0.0) for step in steps)
        lines.append(f"  {part:30s} {seconds / count * 1e3:8.3f} ms  {seconds / total:6.1%}")
    lines.append(
        f"  {'the same Linears alone':30s} {alone / count * 1e3:8.3f} ms  {alone / total:6.1%}"
    )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Account for both workloads and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--requests", type=int, default=96, help="of each workload")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    serving_floor.perf_counter = clock
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        engine = OwnEngine(ServerSettings(model=folder, device="cpu", prefix_cache=False))
        alone = Alone(Linears(load_reference(folder)))
    for workload, make in (("A", workload_a), ("B", workload_b)):
        steps = measure_account(engine, make(arguments.requests), clock).steps
        for kind, is_decode in (("decodes only", True), ("with prompts", False)):
            chosen = [step for step in steps if step.is_decode is is_decode]
            if chosen:
                print(f"{workload}, {kind}: " + "\n".join(table(chosen, alone.seconds(chosen))))
    print(f"{arguments.threads} threads, {describe_machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
