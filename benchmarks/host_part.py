"""What the host does of a step: microseconds of CPU per decode step with the model taken out.

    python benchmarks/host_part.py [--steps N] [--json FILE]

The whole engine runs, planning, inputs, choice of tokens, books and reports to the front included;
only the decoder gives logits that were made before. Thread time, so that a busy machine counts
less; the best of several rounds.
"""

import argparse
import json
import pickle
import sys
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from machine import describe_machine

from quantgate_serve.channel import Submit, asked
from quantgate_serve.config import ServerSettings
from quantgate_serve.engine import Engine
from quantgate_serve.engine_host import EngineHost
from quantgate_serve.native.decoder import Computed
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.startup import build_engine, load_for_serving

DEMO = Path(__file__).resolve().parents[1] / "harness" / "quantgate" / "demo" / "model"
SIZES = (1, 16, 64, 128)
_PROMPT, _ROUNDS = 96, 5


class ReadyLogits:
    """Stands where the decoder was."""

    def __init__(self, vocab_size: int) -> None:
        self._logits = torch.randn(512, vocab_size, generator=torch.Generator().manual_seed(1))
        self._best = self._logits.argmax(dim=-1).tolist()

    def compute(self, *arguments: Any) -> Computed:
        count = len(arguments[-1])
        return Computed(self._logits[:count], self._best[:count], is_finite=True)


class Pipe:
    """A channel to nobody: a report is pickled, as it would be, and dropped."""

    def send(self, message: object) -> None:
        pickle.dumps(message, protocol=5)


def measure(engine: Engine, size: int, steps: int, *, is_streaming: bool) -> float:
    """Microseconds per step of `size` requests, reports to the front included."""
    pipe: Any = Pipe()
    host = EngineHost(engine, pipe)
    params = SamplingParams(max_tokens=(_ROUNDS + 1) * steps, ignore_eos=True)
    prompts = [[3 + n % 200] * _PROMPT for n in range(size)]
    sent = [Request(prompt, params, is_streaming=is_streaming) for prompt in prompts]
    host._take(Submit([asked(request) for request in sent]))
    requests = list(host._requests.values())
    while any(request.num_output == 0 for request in requests):
        engine.step()
    best = float("inf")
    for _ in range(_ROUNDS):
        started = thread_time()
        for _ in range(steps):
            report = host._report(engine.step())
            if report is not None:
                pipe.send(report)
        best = min(best, thread_time() - started)
    engine.abort(requests)
    host._report(engine.step())
    return 1e6 * best / steps


def main(argv: list[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of each round")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = ServerSettings(model=DEMO, device="cpu", max_batch_size=max(SIZES))
    loaded = load_for_serving(DEMO, settings)
    engine = build_engine(loaded, settings)
    runner: Any = engine._runner
    runner._native = ReadyLogits(loaded.vocab_size)
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        row: dict[str, Any] = {"running": size}
        for name, is_streaming in (("whole", False), ("streamed", True)):
            found = measure(engine, size, arguments.steps, is_streaming=is_streaming)
            row[f"us_{name}"] = round(found, 1)
        rows.append(row)
        print(row)
    report = {"machine": describe_machine(), "rows": rows}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
