"""Calibrating on the golden set is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantgate.quality.golden import load_golden_set
from quantgate.quality.overlap import find_overlap

SYSTEM = "You are the order desk of a hardware shop."
LONG = "0123456789" * 3


@pytest.mark.parametrize(("length", "is_found"), [(23, False), (24, True), (25, True)])
def test_an_input_long_enough_not_to_occur_by_chance_is_found(
    write_set: Callable[..., Path], length: int, is_found: bool
) -> None:
    item = {"id": "a", "input": LONG[:length], "target": "x"}
    found = find_overlap([f"before {LONG} after"], [load_golden_set(write_set(item))])
    assert (found is not None) is is_found
    if found:
        assert "1 golden items are in the calibration text (first: small/a)" in found


def test_a_message_is_found_but_not_the_system_prompt_that_all_share(
    write_set: Callable[..., Path],
) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": LONG}]
    golden = load_golden_set(write_set({"id": "a", "input": messages, "target": "x"}))
    assert find_overlap([f"{SYSTEM} Other text."], [golden]) is None
    assert find_overlap([f"{SYSTEM} {LONG}"], [golden]) is not None


def test_no_calibration_text_overlaps_nothing(write_set: Callable[..., Path]) -> None:
    golden = load_golden_set(write_set({"id": "a", "input": LONG, "target": "x"}))
    assert find_overlap([], [golden]) is None
