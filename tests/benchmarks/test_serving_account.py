"""The account of a step counts each second once."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("serving_account")


def test_time_inside_another_part_is_not_counted_twice(module: Any) -> None:
    ticks: Iterator[float] = iter([0.0, 1.0, 4.0, 10.0])
    account = module.Account(None, lambda: next(ticks))
    inner = account.timed(module.SAMPLING, lambda: "token")
    outer = account.timed(module.INPUTS, lambda: inner())
    assert outer() == "token"
    assert account._now == {module.INPUTS: 7.0, module.SAMPLING: 3.0}


def test_shares_are_of_all_parts_of_the_chosen_steps(module: Any) -> None:
    steps = [
        module.StepTimes(4, 4, True, {module.PLANNING: 0.001, module.LOGITS: 0.003}),
        module.StepTimes(2, 2, True, {module.LOGITS: 0.004}),
    ]
    first, *lines = module.table(steps, 0.002)
    assert first == "2 steps of 3.0 tokens, 4.00 ms each"
    assert [
        line.split() for line in lines if line.split()[0] in (module.LOGITS, module.PLANNING)
    ] == [
        ["logits", "3.500", "ms", "87.5%"],
        ["planning", "0.500", "ms", "12.5%"],
    ]
    assert lines[-1].split()[-3:] == ["1.000", "ms", "25.0%"]
