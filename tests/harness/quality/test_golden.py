"""A golden set is a folder with a task and items; what it is does not depend on their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantgate.errors import GoldenSetError
from quantgate.quality.golden import find_golden_set, load_golden_set

WriteSet = Callable[..., Path]
ITEM = {"id": "a", "input": "2+2=", "target": "4"}


def test_an_empty_set_is_refused(write_set: WriteSet) -> None:
    with pytest.raises(GoldenSetError, match="no items"):
        load_golden_set(write_set(""))


@pytest.mark.parametrize("name", ["items.jsonl", "task.yaml"])
def test_a_missing_file_is_named(write_set: WriteSet, name: str) -> None:
    folder = write_set(ITEM)
    (folder / name).unlink()
    with pytest.raises(GoldenSetError, match=f"{name}: missing"):
        load_golden_set(folder)


@pytest.mark.parametrize("name", ["items.jsonl", "task.yaml"])
def test_a_file_that_is_not_utf8_is_refused(write_set: WriteSet, name: str) -> None:
    folder = write_set(ITEM)
    (folder / name).write_bytes(b"task: \xff")
    with pytest.raises(GoldenSetError, match=name):
        load_golden_set(folder)


def test_a_name_is_looked_for_in_each_folder_and_the_answer_says_where(tmp_path: Path) -> None:
    with pytest.raises(GoldenSetError, match=r"'nope' not found; looked for .*gates.*sets"):
        find_golden_set("nope", folders=[tmp_path / "gates", tmp_path / "sets"])


def test_the_order_of_items_and_tags_is_no_part_of_a_sets_identity(write_set: WriteSet) -> None:
    one, two = ITEM | {"tags": ["x", "y"]}, ITEM | {"id": "b"}
    before = load_golden_set(write_set(one, two)).items_sha256
    after = load_golden_set(write_set(two, one | {"tags": ["y", "x"]})).items_sha256
    assert before == after


def test_composed_and_decomposed_letters_are_the_same_item(write_set: WriteSet) -> None:
    composed = load_golden_set(write_set(ITEM | {"input": "caf\u00e9"})).items_sha256
    assert load_golden_set(write_set(ITEM | {"input": "cafe\u0301"})).items_sha256 == composed


def test_a_set_loads_as_a_dataset_in_file_order(write_set: WriteSet) -> None:
    dataset = load_golden_set(write_set(ITEM | {"id": "z"}, ITEM)).dataset()
    assert dataset["id"] == ["z", "a"]
