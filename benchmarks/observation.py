"""What observing costs: microseconds per step for every metric together, beside the step itself.

`python benchmarks/observation.py [--model FOLDER]` decodes a full batch and prints both. Counting
is timed inside the engine (its own calls, on its own plans), in rounds of which the best is told;
a snapshot is what leaves the engine's process ten times a second.
"""

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, perf_counter_ns

import torch

from quantgate_serve.config import ServerSettings
from quantgate_serve.exposition import Exposition
from quantgate_serve.metrics import FrontMetrics
from quantgate_serve.readout import ChunkResult
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.startup import build_engine, load_for_serving
from quantgate_serve.step_meter import Computed

DEMO = Path(__file__).resolve().parents[1] / "harness" / "quantgate" / "demo" / "model"
BATCH = 64
PROMPT = 96
STEPS = 60
REPEATS = 200
SNAPSHOTS_PER_S = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO)
    folder = parser.parse_args().model
    settings = ServerSettings(model=folder, device="cpu", max_batch_size=BATCH)
    loaded = load_for_serving(folder, settings)
    engine = build_engine(loaded, settings)
    engine.warm_up()
    params = SamplingParams(max_tokens=STEPS + 40, ignore_eos=True)
    requests = [Request([3 + n % 200] * PROMPT, params, is_streaming=True) for n in range(BATCH)]
    engine.submit(requests)
    while any(request.num_output == 0 for request in requests):
        engine.step()

    step_s = _best_s(engine.step, STEPS // 3)
    plan = engine._scheduler.schedule()
    assert len(plan) == BATCH
    results = [ChunkResult(chunk, 3) for chunk in plan]
    meter, metrics = engine._meter, engine.metrics

    def count() -> None:
        started_ns = perf_counter_ns()
        meter.observe(Computed(plan, results, started_ns, perf_counter_ns()))
        last_token_ns: dict[int, int] = {}
        for result in results:
            then = result.chunk.request.last_token_ns
            last_token_ns[then] = last_token_ns.get(then, 0) + 1
            metrics.generation_tokens += 1
        for then, number in last_token_ns.items():
            metrics.inter_token_s.observe((started_ns - then) / 1e9, number)
        meter.end(started_ns=started_ns, had_work=True, has_work=True)

    exposition = Exposition("demo", lambda: metrics, FrontMetrics())
    count_s = _best_s(count, REPEATS)
    gauges_s = _best_s(engine.update_gauges, REPEATS)
    snapshot_s = _best_s(lambda: pickle.dumps(metrics), REPEATS)
    scrape_s = _best_s(exposition.render, 20)
    # Gauges are renewed and snapshots leave every 100 ms, both at most once a step.
    per_step_s = count_s + (gauges_s + snapshot_s) * min(1.0, step_s * SNAPSHOTS_PER_S)
    print(f"{folder.name}: batch {BATCH}, context {PROMPT}+, {torch.get_num_threads()} thread(s)")
    print(f"step              {step_s * 1e6:9.1f} us")
    print(f"counting          {count_s * 1e6:9.1f} us per step")
    print(f"gauges            {gauges_s * 1e6:9.1f} us, every 100 ms")
    print(f"snapshot          {snapshot_s * 1e6:9.1f} us, every 100 ms")
    print(f"all, per step     {per_step_s * 1e6:9.1f} us = {per_step_s / step_s:.2%} of the step")
    print(f"scrape (front)    {scrape_s * 1e6:9.1f} us, in a thread of the other process")


def _best_s(work: Callable[[], object], times: int) -> float:
    """The shortest of `times` runs."""
    best = float("inf")
    for _ in range(times):
        started = perf_counter()
        work()
        best = min(best, perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
