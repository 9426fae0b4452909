"""The load stage: champion and candidates resident together, measured in paired blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from quantgate.errors import MeasurementError
from quantgate.files import read_json
from quantgate.load.blocks import (
    ArmFailed,
    BlockFacts,
    block_path,
    facts_path,
    inputs_sha256,
    run_blocks,
)
from quantgate.load.workload import BlockWorkload
from quantgate.server import Server
from quantgate.server_pool import ServerPool

CHAMPION_ARM = "champion"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One server of the load stage."""

    name: str
    folder: Path
    log: Path
    artifact_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFacts:
    """What an arm's servers said of themselves over all blocks."""

    peak_bytes: int
    oom_count: int


def measure_load(
    champion: Arm,
    candidates: Sequence[Arm],
    workloads: Sequence[BlockWorkload],
    *,
    folder: Path,
    arms_together: int | None,
    servers: ServerPool,
    warmup_requests: int,
    timeout_s: float,
    on_block: Callable[[str, int], None],
) -> dict[str, str]:
    """Measures every candidate against the champion; stored rounds are not repeated.

    A round is stored when every arm has its block of these bytes and these requests.

    Args:
        arms_together: servers resident at a time, champion included, at least 2; None for all.

    Returns:
        Why there is no load measurement, by candidate; an arm that dies costs only itself. Where
        the champion died, also under `CHAMPION_ARM`.
    """
    size = max(1, len(candidates) if arms_together is None else arms_together - 1)
    failures: dict[str, str] = {}
    # Without candidates the champion is measured alone: absolute limits judge it too.
    for start in range(0, max(1, len(candidates)), size):
        group = list(candidates[start : start + size])
        while True:
            dead = _measure_group(
                champion, group, workloads, folder=folder / f"group-{start // size}",
                servers=servers, warmup_requests=warmup_requests, timeout_s=timeout_s,
                on_block=on_block,
            )  # fmt: skip
            if dead is None:
                break
            arm, reason = dead
            if arm == CHAMPION_ARM:
                failures |= dict.fromkeys([CHAMPION_ARM, *(c.name for c in group)], reason)
                break
            # The others, champion included, go on without it, from their last whole round.
            failures[arm] = reason
            group = [candidate for candidate in group if candidate.name != arm]
    return failures


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredArm:
    """Where a candidate's blocks lie, and the champion's beside them."""

    group: Path
    arm: str


def find_arm(folder: Path, candidate: str, *, is_champion: bool) -> MeasuredArm | None:
    """The blocks of a candidate; the champion's own where it had no arm beside the champion's."""
    for arm in (candidate, CHAMPION_ARM) if is_champion else (candidate,):
        if found := sorted(folder.glob(f"group-*/{arm}")):
            # An earlier session may have begun with it in another group, or ended.
            path = max(found, key=_num_blocks_and_age)
            return MeasuredArm(group=path.parent, arm=arm)
    return None


def _num_blocks_and_age(arm: Path) -> tuple[int, int]:
    """How many blocks there are, and when the last one was measured."""
    times = [path.stat().st_mtime_ns for path in arm.glob("block-*.parquet")]
    return len(times), max(times, default=0)


def read_facts(folder: Path, arm: str, num_blocks: int) -> ArmFacts:
    """Most memory and all OOMs over an arm's blocks, in whichever session they were measured.

    Raises:
        MeasurementError: a block has none.
    """
    paths = [facts_path(block_path(folder, arm, block)) for block in range(num_blocks)]
    missing = sum(not path.is_file() for path in paths)
    if missing:
        raise MeasurementError(f"{arm}: {missing} of {num_blocks} blocks were not measured")
    facts = [BlockFacts(**read_json(path)) for path in paths]
    return ArmFacts(
        peak_bytes=max(f.peak_bytes for f in facts), oom_count=sum(f.oom_count for f in facts)
    )


def _measure_group(
    champion: Arm,
    candidates: Sequence[Arm],
    workloads: Sequence[BlockWorkload],
    *,
    folder: Path,
    servers: ServerPool,
    warmup_requests: int,
    timeout_s: float,
    on_block: Callable[[str, int], None],
) -> tuple[str, str] | None:
    """Measures one group; returns (arm, reason) when an arm's server failed."""
    arms = {CHAMPION_ARM: champion, **{arm.name: arm for arm in candidates}}
    done = _whole_rounds(folder, arms, workloads)
    for block in range(done):
        for name in arms:
            on_block(name, block)
    if done == len(workloads):
        return None
    _drop_unpaired(folder, arms, first_block=done)
    running: dict[str, Server] = {}
    with ExitStack() as stack:
        for name, arm in arms.items():
            try:
                running[name] = stack.enter_context(servers.serving(arm.folder, log=arm.log))
            except MeasurementError as error:
                return name, str(error)
        try:
            run_blocks(
                running,
                workloads,
                artifacts={name: arm.artifact_sha256 for name, arm in arms.items()},
                first_block=done,
                folder=folder,
                warmup_requests=warmup_requests,
                timeout_s=timeout_s,
                on_block=on_block,
            )
        except ArmFailed as failure:
            return failure.arm, str(failure)
    return None


def _whole_rounds(folder: Path, arms: Mapping[str, Arm], workloads: Sequence[BlockWorkload]) -> int:
    """Rounds at the start in which every arm was measured: they pair, in whichever session."""
    for block, workload in enumerate(workloads):
        for name, arm in arms.items():
            path = block_path(folder, name, block)
            if not (path.is_file() and facts_path(path).is_file()):
                return block
            facts = BlockFacts(**read_json(facts_path(path)))
            if facts.inputs_sha256 != inputs_sha256(arm.artifact_sha256, workload):
                return block
    return len(workloads)


def _drop_unpaired(folder: Path, arms: Mapping[str, Arm], *, first_block: int) -> None:
    """Removes what earlier sessions measured of other arms in rounds that are measured anew."""
    for path in folder.glob("*/block-*.parquet"):
        arm = path.parent.name
        if arm not in arms and path >= block_path(folder, arm, first_block):
            path.unlink()
            facts_path(path).unlink(missing_ok=True)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def workload_digests(workloads: Sequence[BlockWorkload]) -> Mapping[str, str]:
    """The digest of each block's requests."""
    return {f"block-{i:02d}": workload.sha256 for i, workload in enumerate(workloads)}
