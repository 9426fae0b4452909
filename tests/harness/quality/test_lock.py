"""The lock tells what was changed, and what is no change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import GoldenSetError
from quantgate.quality import scoring
from quantgate.quality.golden import load_golden_set
from quantgate.quality.lock import (
    LOCK_NAME,
    changes_since_lock,
    lock_sha256,
    read_lock,
    write_lock,
)
from quantgate.quality.rendering import Renderer

WriteSet = Callable[..., Path]
ONE = {"id": "a", "input": [{"role": "user", "content": "2+2="}], "target": "4", "tags": ["sum"]}
TWO = {"id": "b", "input": "3+3=", "target": "6"}


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Path]) -> Path:
    return make_tokenizer()


def changes(folder: Path, tokenizer: Path) -> list[str]:
    golden = load_golden_set(folder)
    renderer = Renderer(tokenizer)
    rendering = renderer.describe(golden, renderer.render(golden))
    if not (folder / LOCK_NAME).exists():
        write_lock(golden, rendering, model="small")
    return changes_since_lock(golden, rendering, read_lock(folder))


def test_an_unchanged_set_matches_its_lock(write_set: WriteSet, tokenizer: Path) -> None:
    folder = write_set(ONE, TWO)
    assert changes(folder, tokenizer) == []
    lock = read_lock(folder)
    assert (lock["num_items"], lock["tags"], lock["rendered_for"]) == (2, {"sum": 1}, "small")


def test_reordered_items_match(write_set: WriteSet, tokenizer: Path) -> None:
    changes(write_set(ONE, TWO), tokenizer)
    assert changes(write_set(TWO, ONE), tokenizer) == []


def test_one_edited_character_is_found_and_its_item_named(
    write_set: WriteSet, tokenizer: Path
) -> None:
    changes(write_set(ONE, TWO), tokenizer)
    edited = changes(write_set(ONE, TWO | {"target": "7"}), tokenizer)
    assert edited == ["the items (1 differ: b)"]


def test_a_removed_and_an_added_item_are_named(write_set: WriteSet, tokenizer: Path) -> None:
    changes(write_set(ONE, TWO), tokenizer)
    found = changes(write_set(ONE, TWO | {"id": "c"}), tokenizer)
    assert found == ["the items (2 differ: b, c)", "the rendered prompts"]


def test_another_tokenizer_is_found_also_where_its_tokens_are_the_same(
    write_set: WriteSet, tokenizer: Path, make_tokenizer: Callable[..., Path]
) -> None:
    folder = write_set(ONE, TWO)
    changes(folder, tokenizer)
    assert changes(folder, make_tokenizer(merge=("z", "z"))) == ["the tokenizer"]
    other = changes(folder, make_tokenizer(merge=("3", "=")))
    assert other == ["the tokenizer", "the rendered prompts"]


def test_another_chat_template_is_found(
    write_set: WriteSet, tokenizer: Path, make_tokenizer: Callable[..., Path]
) -> None:
    folder = write_set(ONE, TWO)
    changes(folder, tokenizer)
    other = make_tokenizer(template="{{ messages[0].content }}")
    assert changes(folder, other) == ["the chat template", "the rendered prompts"]


def test_another_task_is_found(
    write_set: WriteSet, tokenizer: Path, text_task: dict[str, Any]
) -> None:
    changes(write_set(ONE, TWO), tokenizer)
    task = text_task | {"generation_kwargs": {"max_gen_toks": 9, "until": ["\n"]}}
    assert changes(write_set(ONE, TWO, task=task), tokenizer) == ["the task"]


def test_another_scorer_under_the_same_name_is_found(
    write_set: WriteSet, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(ONE, TWO)
    changes(folder, tokenizer)
    lenient = tmp_path / "exact_match.py"
    lenient.write_text("# everything is right\n", encoding="utf-8")
    monkeypatch.setattr(scoring, "_script", lambda _: lenient)
    assert changes(folder, tokenizer) == ["the scorers"]


def test_a_set_without_a_lock_is_told_how_to_lock_it(write_set: WriteSet) -> None:
    with pytest.raises(GoldenSetError, match="quantgate golden lock"):
        read_lock(write_set(ONE))


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 2}'])
def test_what_is_no_lock_of_this_schema_is_refused(write_set: WriteSet, content: str) -> None:
    folder = write_set(ONE)
    (folder / LOCK_NAME).write_text(content, encoding="utf-8")
    with pytest.raises(GoldenSetError, match=LOCK_NAME):
        read_lock(folder)


def test_the_digest_of_a_lock_is_of_its_values_not_of_its_layout(
    write_set: WriteSet, tokenizer: Path
) -> None:
    folder = write_set(ONE, TWO)
    changes(folder, tokenizer)
    before = lock_sha256(folder)
    path = folder / LOCK_NAME
    path.write_text(json.dumps(json.loads(path.read_text("utf-8"))), encoding="utf-8")
    assert lock_sha256(folder) == before
