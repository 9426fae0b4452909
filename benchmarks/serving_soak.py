"""Memory over many requests: our HTTP server with a tiny model, all its processes."""

import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from serving_arms import ask_client, start_server
from serving_workload import write_tiny_model

from quantgate_serve.config import ServerSettings

DEFAULT_REQUESTS = 50_000
_BATCHES = 50
_CONNECTIONS = 64
# Growth between the middle and the end. A leak of 200 bytes a request would show as 5 MiB.
_MAX_GROWTH_MIB = 5.0


def run_soak(folder: Path, *, count: int) -> tuple[dict[str, Any], list[str]]:
    """Send `count` requests in batches; the report, and what is missed."""
    write_tiny_model(folder / "tiny")
    settings = ServerSettings(model=folder / "tiny", device="cpu")
    source = np.random.default_rng(3)
    per_batch = max(1, count // _BATCHES)
    resident: list[float] = []
    with start_server(settings, folder / "ready.json") as server:
        for _ in range(_BATCHES):
            requests = [
                {
                    "prompt": source.integers(2, 256, int(source.integers(4, 60))).tolist(),
                    "num_output": int(source.integers(1, 6)),
                }
                for _ in range(per_batch)
            ]
            ask_client(
                {
                    "url": server.url,
                    "model": server.model_name,
                    "stream": False,
                    "connections": _CONNECTIONS,
                    "requests": requests,
                }
            )
            resident.append(_resident_mib(server.pid))
            print(f"  {len(resident) * per_batch}: {resident[-1]:.1f} MiB", file=sys.stderr)
    # The first half fills the KV pool and the caches once.
    tenth = _BATCHES // 10
    middle = median(resident[_BATCHES // 2 : _BATCHES // 2 + tenth])
    growth = median(resident[-tenth:]) - middle
    print(
        f"{per_batch * _BATCHES} requests: {growth:+.1f} MiB from {middle:.1f} in their second half"
    )
    missed = []
    if not growth <= _MAX_GROWTH_MIB:
        missed.append(f"resident memory grew by {growth:.1f} MiB, wanted <= {_MAX_GROWTH_MIB}")
    report = {
        "num_requests": per_batch * _BATCHES,
        "resident_mib": [round(value, 1) for value in resident],
        "growth_mib": round(growth, 2),
        "max_growth_mib": _MAX_GROWTH_MIB,
    }
    return report, missed


def _resident_mib(pid: int) -> float:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return float(sum(member.memory_info().rss for member in family) / 2**20)
