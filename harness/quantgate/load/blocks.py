"""Paired blocks: in each round every arm replays the same requests, in an order that alternates.

Drift of the machine then falls on all arms alike (ABBA), and the same requests cancel the noise of
the workload: in simulation the spread of a p95 log-ratio falls fourfold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from quantgate.errors import MeasurementError
from quantgate.files import sha256_of_json, write_json, write_with
from quantgate.load.client import PhaseRecord, RequestRecord, replay
from quantgate.load.workload import BlockWorkload
from quantgate.server import Server

BURST = "burst"
STEADY = "steady"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """What a server said of itself at the end of a block.

    Kept per block: a later session has another server, which knows nothing of an earlier OOM.
    """

    peak_bytes: int
    """Most memory held since the server started."""
    oom_count: int
    """During this block."""
    inputs_sha256: str = ""
    """What was measured; a release that goes on keeps only blocks of what it measures now."""


class ArmFailed(MeasurementError):
    """An arm cannot be measured on; `arm` says which."""

    def __init__(self, arm: str, reason: str) -> None:
        super().__init__(reason)
        self.arm = arm


def block_path(folder: Path, arm: str, block: int) -> Path:
    return folder / arm / f"block-{block:02d}.parquet"


def facts_path(block: Path) -> Path:
    """Beside a block's requests."""
    return block.with_suffix(".json")


def inputs_sha256(artifact_sha256: str, workload: BlockWorkload) -> str:
    """The artifact that served a block, and the requests that it replayed."""
    return sha256_of_json([artifact_sha256, workload.sha256])


def round_order(arms: Sequence[str], block: int) -> list[str]:
    """Forwards in even rounds, backwards in odd ones."""
    return list(arms) if block % 2 == 0 else list(reversed(arms))


def run_blocks(
    arms: Mapping[str, Server],
    workloads: Sequence[BlockWorkload],
    *,
    artifacts: Mapping[str, str],
    first_block: int,
    folder: Path,
    warmup_requests: int,
    timeout_s: float,
    on_block: Callable[[str, int], None],
) -> None:
    """Runs the rounds from `first_block` on and stores each block's requests at `block_path`.

    Args:
        artifacts: the sha256 of what each arm serves.

    Raises:
        ArmFailed: an arm's server ended or does not answer; blocks already stored stay.
    """
    for block, workload in list(enumerate(workloads))[first_block:]:
        for arm in round_order(list(arms), block):
            path = block_path(folder, arm, block)
            try:
                inputs = inputs_sha256(artifacts[arm], workload)
                _run_block(arms[arm], workload, path, warmup_requests, timeout_s, inputs=inputs)
            except MeasurementError as error:
                raise ArmFailed(arm, str(error)) from error
            on_block(arm, block)


def _run_block(
    server: Server,
    workload: BlockWorkload,
    path: Path,
    warmup_requests: int,
    timeout_s: float,
    *,
    inputs: str,
) -> None:
    ooms_before = server.oom_count()
    # Not measured: an idle process has cold caches and a clocked-down core.
    replay(server.url, workload.burst[:warmup_requests], timeout_s=timeout_s)
    burst = replay(server.url, workload.burst, timeout_s=timeout_s)
    steady = replay(server.url, workload.steady, timeout_s=timeout_s)
    facts = BlockFacts(
        peak_bytes=server.peak_bytes(),
        oom_count=server.oom_count() - ooms_before,
        inputs_sha256=inputs,
    )
    # Before the block itself, so that no block is without its facts.
    path.unlink(missing_ok=True)
    write_json(facts_path(path), asdict(facts))
    write_block(path, {BURST: burst, STEADY: steady})


def write_block(path: Path, phases: Mapping[str, PhaseRecord]) -> None:
    """Stores one block: a row per request, with its phase's duration and client CPU share."""
    rows = [
        {
            "phase": phase,
            "duration_ms": record.duration_ms,
            "client_cpu_share": record.client_cpu_share,
            **asdict(request),
        }
        for phase, record in phases.items()
        for request in record.requests
    ]
    table = pa.Table.from_pylist(rows)
    write_with(path, partial(pq.write_table, table))


def read_block(path: Path) -> dict[str, PhaseRecord]:
    """The phases of one stored block."""
    names = [field.name for field in fields(RequestRecord)]
    phases: dict[str, PhaseRecord] = {}
    rows = pq.read_table(path).to_pylist()
    for phase in dict.fromkeys(row["phase"] for row in rows):
        of_phase = [row for row in rows if row["phase"] == phase]
        phases[phase] = PhaseRecord(
            requests=tuple(RequestRecord(**{n: row[n] for n in names}) for row in of_phase),
            duration_ms=of_phase[0]["duration_ms"],
            client_cpu_share=of_phase[0]["client_cpu_share"],
        )
    return phases
