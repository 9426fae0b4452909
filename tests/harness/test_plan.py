"""What must be equal for a release that was cut short to go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantgate import plan
from quantgate.plan import Plan, make_plan

if TYPE_CHECKING:
    from conftest import MiniProject

Change = Callable[[Path, pytest.MonkeyPatch], Any]


@pytest.fixture
def plan_after(
    mini_project: MiniProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Change], Plan]:
    """The plan of a copy of the project, once something about it has changed."""

    def make(change: Change) -> Plan:
        root = tmp_path / "project"
        shutil.copytree(mini_project.root, root, ignore=shutil.ignore_patterns("runs"))
        change(root, monkeypatch)
        return make_plan(type(mini_project)(root).request())

    return make


def edit(*parts: str) -> Change:
    """Adds an empty line to a file of the project, or a letter to a golden item."""

    def change(root: Path, _: pytest.MonkeyPatch) -> None:
        path = root.joinpath(*parts)
        text = path.read_text(encoding="utf-8")
        is_set = path.suffix == ".jsonl"
        new = text.replace('"id": "', '"id": "x', 1) if is_set else f"{text}\n"
        assert new != text
        path.write_text(new, encoding="utf-8")

    return change


def test_a_copy_of_the_project_is_the_same_release(
    mini_project: MiniProject, plan_after: Callable[[Change], Plan]
) -> None:
    before = make_plan(mini_project.request()).identity()
    assert plan_after(lambda root, _: None).identity() == before


@pytest.mark.parametrize(
    "change",
    [
        edit("gates", "policies", "mini.cpu.yaml"),
        edit("golden_sets", "order-total", "items.jsonl"),
        edit("golden_sets", "order-prose", "items.jsonl"),
        edit("order-desk", "tokenizer_config.json"),
        lambda _, patch: patch.setattr(plan, "engine_sha256", lambda: "another engine"),
        lambda _, patch: patch.setattr(plan, "processor_of", lambda device: "another processor"),
    ],
    ids=["policy", "golden set", "documents", "model", "engine", "processor"],
)
def test_other_inputs_another_engine_or_another_machine_are_not(
    mini_project: MiniProject, plan_after: Callable[[Change], Plan], change: Change
) -> None:
    before = make_plan(mini_project.request()).identity()
    assert plan_after(change).identity() != before
