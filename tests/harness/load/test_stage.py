"""Rounds over several arms: whole, alternating, resumable; who dies costs only itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from quantgate.errors import MeasurementError, ServerDied
from quantgate.load.blocks import BURST, STEADY, block_path, facts_path, read_block, round_order
from quantgate.load.results import read_arm
from quantgate.load.stage import CHAMPION_ARM, Arm, find_arm, measure_load, read_facts
from quantgate.load.workload import BlockWorkload

Measure = Callable[..., dict[str, str]]


class FakePool:
    """Gives each folder the server that the test made for it."""

    def __init__(self) -> None:
        self.servers: dict[str, Any] = {}
        self.started: list[str] = []

    @contextmanager
    def serving(self, folder: Path, *, log: Path) -> Iterator[Any]:
        self.started.append(folder.name)
        if folder.name not in self.servers:
            raise ServerDied(f"the server exited (exit code 1):\n  no {folder.name}")
        yield self.servers[folder.name]


@pytest.fixture
def pool(fake_server: Callable[..., Any]) -> FakePool:
    """Servers for the champion and two candidates."""
    pool = FakePool()
    pool.servers = {name: fake_server() for name in ("champion", "a", "b")}
    return pool


@pytest.fixture
def workloads(requests_at: Callable[..., Any]) -> list[BlockWorkload]:
    return [BlockWorkload(burst=requests_at(0, 0), steady=requests_at(1, 2))] * 3


@pytest.fixture
def measure(pool: FakePool, workloads: list[BlockWorkload], tmp_path: Path) -> Measure:
    def run(
        *names: str,
        arms_together: int | None = None,
        told: list[Any] | None = None,
        digests: Mapping[str, str] | None = None,
        requests: list[BlockWorkload] = workloads,
    ) -> Any:
        def arm(name: str) -> Arm:
            return Arm(
                name=name,
                folder=tmp_path / name,
                log=tmp_path / f"{name}.log",
                artifact_sha256=(digests or {}).get(name, "a" * 64),
            )

        def on_block(name: str, block: int) -> None:
            if told is not None:
                told.append((name, block))

        return measure_load(
            arm("champion"),
            [arm(name) for name in names],
            requests,
            folder=tmp_path / "load",
            arms_together=arms_together,
            servers=pool,  # type: ignore[arg-type]
            warmup_requests=1,
            timeout_s=10.0,
            on_block=on_block,
        )

    return run


def dies_at(server: Any, request: int) -> Callable[[dict[str, Any]], Any]:
    """A block here is a warm-up of one, a burst of two and a steady phase of two."""

    async def complete(body: dict[str, Any]) -> web.Response:
        if server.num_requests >= request:
            server.die()
            return web.Response(status=500)
        return web.json_response({"usage": {"completion_tokens": body["max_tokens"]}})

    return complete


def test_rounds_run_forwards_and_backwards_in_turn() -> None:
    assert round_order(["champion", "a", "b"], 0) == ["champion", "a", "b"]
    assert round_order(["champion", "a", "b"], 1) == ["b", "a", "champion"]
    assert round_order(["champion", "a"], 2) == ["champion", "a"]


def test_every_arm_replays_every_block_in_alternating_order(
    measure: Measure, tmp_path: Path
) -> None:
    told: list[Any] = []
    assert measure("a", told=told) == {}
    assert told == [
        *((CHAMPION_ARM, 0), ("a", 0), ("a", 1), (CHAMPION_ARM, 1), (CHAMPION_ARM, 2), ("a", 2))
    ]
    phases = read_block(block_path(tmp_path / "load" / "group-0", "a", 1))
    assert [len(phases[name].requests) for name in (BURST, STEADY)] == [2, 2]


def test_a_second_session_measures_only_the_rounds_that_are_not_whole(
    measure: Measure, pool: FakePool, tmp_path: Path
) -> None:
    measure("a")
    group = tmp_path / "load" / "group-0"
    block_path(group, "a", 1).unlink()
    kept = block_path(group, CHAMPION_ARM, 0).read_bytes()
    again = block_path(group, CHAMPION_ARM, 2).read_bytes()
    before = pool.servers["a"].num_requests
    assert measure("a") == {}
    # Rounds 1 and 2, of five requests each: a round pairs only as a whole, and in its order.
    assert pool.servers["a"].num_requests - before == 10
    assert block_path(group, CHAMPION_ARM, 0).read_bytes() == kept
    assert block_path(group, CHAMPION_ARM, 2).read_bytes() != again


def test_a_stage_that_is_done_starts_no_server(measure: Measure, pool: FakePool) -> None:
    measure("a")
    pool.started.clear()
    told: list[Any] = []
    assert measure("a", told=told) == {}
    assert pool.started == []
    assert len(told) == 6


@pytest.mark.parametrize("changed", ["a", "champion"])
def test_rounds_of_other_bytes_than_are_judged_now_are_measured_again(
    measure: Measure, pool: FakePool, tmp_path: Path, changed: str
) -> None:
    measure("a")
    group = tmp_path / "load" / "group-0"
    paths = [block_path(group, arm, block) for arm in (CHAMPION_ARM, "a") for block in range(3)]
    before = [path.read_bytes() for path in paths]
    told: list[Any] = []
    assert measure("a", digests={changed: "b" * 64}, told=told) == {}
    assert sorted(pool.started) == ["a", "a", "champion", "champion"]
    assert len(told) == 6
    assert all(path.read_bytes() != old for path, old in zip(paths, before, strict=True))


def test_rounds_of_other_requests_are_measured_again(
    measure: Measure,
    pool: FakePool,
    workloads: list[BlockWorkload],
    requests_at: Callable[..., Any],
) -> None:
    measure("a")
    before = pool.servers["a"].num_requests
    others = [*workloads[:2], BlockWorkload(burst=requests_at(0, 0), steady=requests_at(1, 3))]
    assert measure("a", requests=others) == {}
    assert pool.servers["a"].num_requests - before == 5


def test_an_arm_that_moved_to_another_group_is_not_paired_with_a_champion_of_another_session(
    measure: Measure, pool: FakePool, tmp_path: Path
) -> None:
    """What could not be built is missing in the first session, and there in the next."""
    measure("b", arms_together=2)
    load = tmp_path / "load"
    measure("a", "b", arms_together=2)
    assert names(find_arm(load, "b", is_champion=False)) == ("group-1", "b")
    assert not (load / "group-0" / "b").exists()
    assert len(read_arm(load / "group-1", "b", 3).blocks) == 3


def test_an_arm_is_read_where_it_was_measured_last(measure: Measure, tmp_path: Path) -> None:
    """What is left of other bytes, in a group that is whole without them, is not what is judged."""
    measure("a", "b")
    assert measure("a", "b", arms_together=2, digests={"b": "b" * 64}) == {}
    load = tmp_path / "load"
    assert names(find_arm(load, "b", is_champion=False)) == ("group-1", "b")


def test_an_oom_of_an_earlier_session_is_not_forgotten(
    measure: Measure, pool: FakePool, fake_server: Callable[..., Any], tmp_path: Path
) -> None:
    first = pool.servers["a"]

    async def runs_out_once(body: dict[str, Any]) -> web.Response:
        first.ooms, first.peak = 1, 5000
        return web.json_response({"usage": {"completion_tokens": body["max_tokens"]}})

    first.complete = runs_out_once
    measure("a")
    group = tmp_path / "load" / "group-0"
    block_path(group, "a", 2).unlink()
    pool.servers["a"] = fake_server()
    measure("a")
    facts = read_facts(group, "a", 3)
    assert (facts.oom_count, facts.peak_bytes) == (1, 5000)


def test_facts_of_a_block_that_is_missing_are_an_error(measure: Measure, tmp_path: Path) -> None:
    measure("a")
    group = tmp_path / "load" / "group-0"
    facts_path(block_path(group, "a", 1)).unlink()
    with pytest.raises(MeasurementError, match="a: 1 of 3 blocks were not measured"):
        read_facts(group, "a", 3)


@pytest.mark.parametrize("request_number", [1, 4, 8])
def test_an_arm_that_dies_costs_only_itself(
    measure: Measure, pool: FakePool, tmp_path: Path, request_number: int
) -> None:
    dying = pool.servers["a"]
    dying.complete = dies_at(dying, request_number)
    failures = measure("a", "b")
    assert failures.keys() == {"a"}
    assert "the server exited (signal SIGKILL)" in failures["a"]
    assert "CUDA out of memory" in failures["a"]
    for arm in (CHAMPION_ARM, "b"):
        assert len(read_arm(tmp_path / "load" / "group-0", arm, 3).blocks) == 3


def test_an_arm_that_does_not_start_costs_only_itself(
    measure: Measure, pool: FakePool, tmp_path: Path
) -> None:
    del pool.servers["a"]
    failures = measure("a", "b")
    assert failures.keys() == {"a"}
    assert "no a" in failures["a"]
    assert len(read_arm(tmp_path / "load" / "group-0", "b", 3).blocks) == 3


def test_the_only_candidate_that_dies_leaves_the_champion_measured(
    measure: Measure, pool: FakePool, tmp_path: Path
) -> None:
    del pool.servers["a"]
    assert measure("a").keys() == {"a"}
    assert len(read_arm(tmp_path / "load" / "group-0", CHAMPION_ARM, 3).blocks) == 3


def test_a_champion_without_candidates_is_measured_alone(measure: Measure, tmp_path: Path) -> None:
    assert measure() == {}
    assert len(read_arm(tmp_path / "load" / "group-0", CHAMPION_ARM, 3).blocks) == 3


def test_a_champion_that_dies_costs_its_group(measure: Measure, pool: FakePool) -> None:
    dying = pool.servers["champion"]
    dying.complete = dies_at(dying, 2)
    assert measure("a", "b").keys() == {CHAMPION_ARM, "a", "b"}


def test_where_few_servers_fit_each_group_has_the_champion_beside_it(
    measure: Measure, pool: FakePool, tmp_path: Path
) -> None:
    assert measure("a", "b", arms_together=2) == {}
    assert pool.started == ["champion", "a", "champion", "b"]
    load = tmp_path / "load"
    for group, name in (("group-0", "a"), ("group-1", "b")):
        found = find_arm(load, name, is_champion=False)
        assert found is not None
        assert (found.group, found.arm) == (load / group, name)
        assert (load / group / CHAMPION_ARM).is_dir()


def names(found: Any) -> Sequence[str]:
    return (found.group.name, found.arm)


def test_a_champion_without_an_arm_of_its_own_is_found_under_the_champions(
    measure: Measure, tmp_path: Path
) -> None:
    measure("a")
    load = tmp_path / "load"
    assert names(find_arm(load, "bf16", is_champion=True)) == ("group-0", CHAMPION_ARM)
    assert names(find_arm(load, "a", is_champion=True)) == ("group-0", "a")
    assert find_arm(load, "bf16", is_champion=False) is None
