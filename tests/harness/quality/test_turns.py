"""Workers that share queues: order, one at a time, longest first, and what fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from quantgate.quality.turns import Piece, take_turns


def pieces(name: str, *sizes: float, done: list[str]) -> list[Piece]:
    """Each notes that it was done, as the name and a number."""

    def noting(number: int) -> Callable[[], None]:
        return lambda: done.append(f"{name}{number}")

    return [
        Piece(name=f"{name}{number}", size=size, work=noting(number))
        for number, size in enumerate(sizes)
    ]


def test_a_worker_takes_the_longest_queue_and_keeps_its_order() -> None:
    done: list[str] = []
    queues = {
        "a": pieces("a", 1, 1, done=done),
        "b": pieces("b", 1, 3, done=done),
        "c": pieces("c", 1, done=done),
    }
    take_turns(queues, workers=1)
    # 2, 4, 1; then 2, 3, 1; then 2, 0, 1; equals as they are named.
    assert done == ["b0", "b1", "a0", "a1", "c0"]


def test_no_two_pieces_of_one_queue_are_under_way_at_a_time() -> None:
    together: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        assert lock.acquire(blocking=False)
        together.append(1)
        lock.release()

    take_turns({"a": [Piece(name="x", size=1, work=work)] * 50}, workers=4)
    assert len(together) == 50


def test_two_queues_are_worked_at_side_by_side() -> None:
    meeting = threading.Barrier(2, timeout=10)
    piece = Piece(name="x", size=1, work=lambda: void(meeting.wait()))
    take_turns({"a": [piece], "b": [piece]}, workers=2)


def test_a_piece_waits_until_it_is_ready_and_others_go_before() -> None:
    done: list[str] = []
    late = Piece(name="x", size=9, work=lambda: done.append("late"), is_ready=lambda: "a1" in done)
    take_turns({"late": [late], "a": pieces("a", 1, 1, done=done)}, workers=2)
    assert done == ["a0", "a1", "late"]


def test_pieces_that_wait_for_nothing_under_way_are_an_error() -> None:
    never = Piece(name="x", size=1, work=lambda: None, is_ready=lambda: False)
    with pytest.raises(RuntimeError, match="never"):
        take_turns({"never": [never]}, workers=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_piece_raises_is_raised_and_nothing_more_is_begun(workers: int) -> None:
    done: list[str] = []

    def fail() -> None:
        raise ValueError("a broken piece")

    queues = {"bad": [Piece(name="x", size=9, work=fail), *pieces("bad", 1, done=done)]}
    with pytest.raises(ValueError, match="a broken piece"):
        take_turns(queues, workers=workers)
    assert done == []


def test_the_seconds_of_each_piece_are_told_by_queue() -> None:
    queues = {"a": [Piece(name="slow", size=1, work=lambda: time.sleep(0.05))], "b": []}
    seconds = take_turns(queues, workers=2)
    assert seconds.keys() == {"a", "b"}
    assert seconds["a"].keys() == {"slow"}
    assert seconds["a"]["slow"] >= 0.05


def test_without_pieces_nothing_is_done() -> None:
    assert take_turns({"a": []}, workers=2) == {"a": {}}


def void(_: object) -> None:
    """For a lambda that must return nothing."""
