"""Comparing candidates with the reference in a child process."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantgate.quality.distribution import Candidate, Comparison, compare_with_reference
from quantgate.quality.golden_items import GoldenItem
from quantgate.quality.rendering import RenderedPrompt


def test_a_candidate_that_cannot_be_scored_fails_with_the_last_lines_of_the_log(
    tmp_path: Path,
) -> None:
    item = GoldenItem(
        id="a", text="x", messages=None, target="", choices=(), tags=(), cluster="a", line=1
    )
    failures = compare_with_reference(
        Comparison(
            reference=tmp_path / "no-model",
            documents=[RenderedPrompt(item=item, ids=(1, 2))],
            device="cpu",
            dtype="float32",
            threads=1,
            max_tokens=8,
            max_context=None,
        ),
        {"int8": Candidate(folder=tmp_path / "int8", scheme="int8-bnb", group_size=128)},
        out={"int8": tmp_path / "int8.parquet"},
        log=tmp_path / "log" / "distribution.log",
        on_done=lambda _: pytest.fail("nothing was scored"),
    )
    assert "teacher-forced scoring failed (exit 1)" in failures["int8"]
    assert "no-model" in failures["int8"]
