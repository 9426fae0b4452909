"""A drill from end to end on a policy with a blind spot, which it names with what to add."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantgate.drill.results import Caught
from quantgate.drill.runner import DrillRequest, run_drill
from quantgate.errors import UsageError
from quantgate.plan import ReleaseRequest
from quantgate.policy import load_policy
from quantgate.progress import Silent

POLICY = """
policy: drilled
model: demo
device: cpu
champion: bf16
variants: {bf16: {scheme: bf16}}
gates:
  - {id: weights, metric: audit/weight_error.ratio, test: limit, max: 1.4 x}
"""


def request(tmp_path: Path, *faults: str) -> DrillRequest:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    release = ReleaseRequest(
        policy=load_policy(path), runs=tmp_path / "runs", serving_config=tmp_path / "s.yaml"
    )
    return DrillRequest(release=release, faults=faults)


def test_a_blind_spot_is_named_with_the_gate_to_add(tmp_path: Path) -> None:
    faults = ("neighbours-weights", "eos-changed", "stale-cache", "resharded", "nibbles-swapped")
    result, path = run_drill(request(tmp_path, *faults), Silent())
    found = {row.fault: (row.outcome, row.layer) for row in result.rows}
    assert found == {
        "neighbours-weights": (Caught.CAUGHT, "audit"),
        "eos-changed": (Caught.LET_THROUGH, ""),
        "stale-cache": (Caught.CAUGHT, "digest"),
        "resharded": (Caught.PASSED, ""),
    }
    assert not result.is_clean
    assert "audit/file_difference.count" in result.advice["eos-changed"]
    assert "nibbles-swapped" in result.not_applicable
    assert json.loads(path.read_text(encoding="utf-8"))["num_caught"] == 2
    # Mutants are as large as models: none is left behind.
    assert not (path.parent / "mutants").exists()


def test_an_unknown_fault_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--faults nothing: no such fault"):
        run_drill(request(tmp_path, "nothing"), Silent())
    assert not (tmp_path / "runs").exists()
