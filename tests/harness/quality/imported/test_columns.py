"""From columns to items: what each column means, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import GoldenSetError, UsageError
from quantgate.quality.golden import load_golden_set
from quantgate.quality.golden_items import GoldenItem
from quantgate.quality.imported.columns import Columns, import_table
from quantgate.quality.imported.folder import checked_name, write_imported
from quantgate.quality.imported.table import read_csv, read_jsonl

LETTERS = ("A", "B", "C")


def imported(tmp_path: Path, text: str, **columns: Any) -> tuple[GoldenItem, ...]:
    """The items of a table, read back by the reader of golden sets."""
    is_json = text.startswith("{")
    path = tmp_path / ("faq.jsonl" if is_json else "faq.csv")
    path.write_text(text, encoding="utf-8")
    table = read_jsonl(path) if is_json else read_csv(path)
    chosen = Columns(**{"prompt": "q", "answer": "a"} | columns)
    written = write_imported(import_table(table, chosen, name="faq"), tmp_path / "faq")
    items = load_golden_set(tmp_path / "faq").items
    assert [item.canonical() for item in items] == [item.canonical() for item in written]
    return items


def test_a_question_and_its_answer_become_an_item_to_generate(tmp_path: Path) -> None:
    (item,) = imported(tmp_path, "q,a\n2+2=,4\n", max_tokens=5, until=("\n",))
    assert (item.id, item.text, item.target, item.choices) == ("faq-00000", "2+2=", "4", ())
    task = load_golden_set(tmp_path / "faq").task
    assert task.output_type == "generate_until"
    assert (task.generation_kwargs.max_gen_toks, task.generation_kwargs.until) == (5, ("\n",))
    assert [check.type for check in task.validity] == ["non_empty", "finished"]


def test_ids_tags_and_clusters_come_from_their_columns(tmp_path: Path) -> None:
    items = imported(
        tmp_path,
        "q,a,key,kind,page\nx,1,k1,long,7\ny,2,k2,,7\n",
        id="key",
        tags=("kind",),
        cluster="page",
    )
    assert [(item.id, item.tags, item.cluster) for item in items] == [
        ("k1", ("kind:long",), "7"),
        ("k2", (), "7"),
    ]


def test_a_chat_question_becomes_a_message_and_its_choices_follow_without_a_space(
    tmp_path: Path,
) -> None:
    (item,) = imported(tmp_path, "q,a,A,B,C\nx,B,one,two,three\n", choices=LETTERS, is_chat=True)
    assert item.messages == ({"role": "user", "content": "x"},)
    assert item.choices == ("one", "two", "three")


@pytest.mark.parametrize(
    ("prompt", "delimiter", "between"),
    [("x", None, " "), ('"x\n"', None, ""), ("x", "", ""), ("x", ": ", ": ")],
)
def test_a_space_stands_between_text_and_choice_unless_white_space_does(
    tmp_path: Path, prompt: str, delimiter: str | None, between: str
) -> None:
    text = f"q,a,A,B,C\n{prompt},two,one,two,three\n"
    (item,) = imported(tmp_path, text, choices=LETTERS, delimiter=delimiter)
    assert item.target == f"{between}two"
    assert item.choices == tuple(f"{between}{word}" for word in ("one", "two", "three"))


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("q,a,A,B,C\nx,B,one,two,three\n", {"choices": LETTERS}),
        ("q,a,A,B,C\nx,two,one,two,three\n", {"choices": LETTERS}),
        ('q,a,o\nx,two,"[""one"", ""two""]"\n', {"choices": ("o",)}),
        (json.dumps({"q": "x", "a": 1, "o": ["one", "two"]}), {"choices": ("o",)}),
        (
            json.dumps({"q": "x", "a": "B", "o": {"text": ["one", "two"], "label": ["A", "B"]}}),
            {"choices": ("o.text",), "labels": "o.label"},
        ),
    ],
    ids=["name", "text", "list", "position", "label"],
)
def test_an_answer_is_a_choice_by_its_text_its_name_or_its_position(
    tmp_path: Path, text: str, columns: dict[str, Any]
) -> None:
    assert imported(tmp_path, text, **columns)[0].target == " two"


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("q,a\nx,1\ny, \n", {}, ":3: column 'a' is empty"),
        ("q,a\n,1\n", {}, ":2: column 'q' is empty"),
        ("q,a\nx,1\n", {"answer": "b"}, ":2: no column 'b'; there are q, a"),
        ("q,a,k\nx,1,k\ny,2,k\n", {"id": "k"}, ":3: id 'k' was used on line 2 already"),
        ("q,a,A,B,C\nx,B,1,2,3\ny,D,1,2,3\n", {"choices": LETTERS}, ":3: answer 'D' is none of"),
        ("q,a,A,B,C\nx,B,1,2,\n", {"choices": LETTERS}, ":2: column 'C' is empty"),
        ("q,a,A,B,C\nx,B,1,1,3\n", {"choices": LETTERS}, ":2: choices must be at least two"),
        ("q,a,o\nx,1,1|2\n", {"choices": ("o",)}, ":2: column 'o' holds '1|2'; expected a JSON"),
        ("q,a\nx,1\n", {"metrics": ("json_fields",)}, ":2: target '1' has no fields"),
        ("q,a\nx,one\n", {"metrics": ("json_fields",)}, ":2: target is not JSON"),
        ('{"q": "\\ud800", "a": "1"}', {}, ":1: half of a surrogate pair"),
        # A and B are names here, and each is also another choice's text.
        ("q,a,A,B,C\nx,A,B,A,C\n", {"choices": LETTERS}, ":2: column 'a' could hold"),
        (
            '{"q": "x", "a": "A", "o": ["1", "2"], "l": ["A"]}',
            {"choices": ("o",), "labels": "l"},
            ":1: column 'l' names 1 choices, but there are 2",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_nothing_is_written(
    tmp_path: Path, text: str, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(GoldenSetError) as caught:
        imported(tmp_path, text, **columns)
    name = "faq.jsonl" if text.startswith("{") else "faq.csv"
    assert str(caught.value).startswith(f"{tmp_path / name}{message}")
    assert not (tmp_path / "faq").exists()


def test_answers_that_are_names_in_one_row_and_texts_in_another_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(GoldenSetError, match=r"csv:3: answer '2' is none .*nor one of their names"):
        imported(tmp_path, "q,a,A,B,C\nx,B,1,2,3\ny,2,1,2,3\nz,A,1,2,3\n", choices=LETTERS)


def test_an_unknown_metric_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(GoldenSetError, match=r"faq: metric_list\.0\.metric: .*'exact_match'"):
        imported(tmp_path, "q,a\nx,1\n", metrics=("rouge",))
    assert not (tmp_path / "faq").exists()


def test_a_golden_set_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    imported(tmp_path, "q,a\nx,1\n")
    with pytest.raises(UsageError, match="holds a golden set already"):
        imported(tmp_path, "q,a\nx,1\n")


@pytest.mark.parametrize("name", ["my set", "a.b", "é"])
def test_a_name_that_no_metric_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="letters, digits"):
        checked_name(tmp_path / name)


def test_the_card_says_where_the_set_came_from(tmp_path: Path) -> None:
    imported(tmp_path, "q,a,kind\nx,1,long\n", tags=("kind",))
    card = (tmp_path / "faq" / "CARD.md").read_text(encoding="utf-8")
    assert "`faq.csv` (sha256 " in card
    assert "prompt from `q`, answer from `a`, tags from `kind`" in card
    assert "| `kind:long` | 1 |" in card
