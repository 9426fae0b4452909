"""What a release ran on."""

from __future__ import annotations

import json

import pytest

from quantgate import machine


def test_facts_of_this_machine_can_be_written_down() -> None:
    facts = machine.describe_machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["num_cores"] >= 1
    assert facts["memory_bytes"] > 0
    assert facts["cpu"]
    assert "torch" in facts["packages"]
    # What is not known is left out, not empty.
    assert None not in facts.values()
    assert facts.get("gpus") != []


@pytest.mark.parametrize(
    ("wanted", "gpus", "chosen"),
    [
        ("auto", [], "cpu"),
        ("auto", ["H200"], "cuda:0"),
        ("cpu", ["H200"], "cpu"),
        ("cuda", [], "cuda:0"),
        ("cuda:1", [], "cuda:1"),
    ],
)
def test_auto_is_the_first_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpus: list[str], chosen: str
) -> None:
    monkeypatch.setattr(machine, "gpu_names", lambda: gpus)
    assert machine.choose_device(wanted) == chosen


def test_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "commit" not in machine.describe_machine()
