"""Items are read strictly: nothing is guessed, and a mistake is named by its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import GoldenSetError
from quantgate.quality.golden import load_golden_set

WriteSet = Callable[..., Path]
ITEM = {"id": "a", "input": "2+2=", "target": "4"}
CHOICE = {"id": "a", "input": "q\n", "target": "x", "choices": ["x", "y"]}


def test_an_item_without_a_cluster_is_a_document_of_its_own(write_set: WriteSet) -> None:
    golden = load_golden_set(write_set(ITEM, ITEM | {"id": "b", "cluster": 0}))
    assert [item.cluster for item in golden.items] == ["a", "0"]


@pytest.mark.parametrize(
    ("given", "name"), [("ideal", "target"), ("expected_output", "target"), ("prompt", "input")]
)
def test_names_that_other_tools_write_are_understood(
    write_set: WriteSet, given: str, name: str
) -> None:
    renamed = {given if key == name else key: value for key, value in ITEM.items()}
    (item,) = load_golden_set(write_set(renamed)).items
    assert (item.text, item.target) == ("2+2=", "4")


def test_a_target_may_be_a_list_of_one(write_set: WriteSet) -> None:
    assert load_golden_set(write_set(ITEM | {"target": ["4"]})).items[0].target == "4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, found [1]"),
        ('{"id": "b", "input": "x", "target": "4", "target": "5"}', "'target' stands twice"),
        ('{"id": "b", "input": "x \\ud83d", "target": "4"}', "half of a surrogate pair"),
        (ITEM, "id 'a' was used on line 1 already"),
        (ITEM | {"id": ""}, "id is missing or empty"),
        (ITEM | {"id": 3}, "id is missing or empty"),
        (ITEM | {"id": "b", "target": ""}, "target is missing or empty"),
        (ITEM | {"id": "b", "target": " \n"}, "target is missing or empty"),
        (ITEM | {"id": "b", "target": ["4", "four"]}, "target has 2 answers; expected one"),
        ({"id": "b", "input": "x"}, "target is missing or empty"),
        (ITEM | {"id": "b", "input": ""}, "input is missing or empty"),
        (ITEM | {"id": "b", "input": []}, "input is missing or empty"),
        (ITEM | {"id": "b", "input": [{"role": "user"}]}, "a message must be"),
        (ITEM | {"id": "b", "ideal": "4"}, "both 'target' and its alias 'ideal'; keep one"),
        (ITEM | {"id": "b", "answer": "4"}, "unknown field 'answer'"),
        (ITEM | {"id": "b", "tags": "long"}, "tags is 'long'; expected a list of strings"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_line(
    write_set: WriteSet, line: Any, message: str
) -> None:
    # A blank line counts as a line, or editors and messages would disagree.
    folder = write_set(ITEM, "", line)
    with pytest.raises(GoldenSetError) as caught:
        load_golden_set(folder)
    assert str(caught.value).startswith(f"{folder}/items.jsonl:3: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": []}, "at least two different strings"),
        ({"choices": ["x"]}, "at least two different strings"),
        ({"choices": ["x", "x"]}, "at least two different strings"),
        ({"choices": "xy"}, "choices is 'xy'; expected a list of strings"),
        ({"choices": ["x", 1]}, "expected a list of strings"),
        ({"target": "z"}, "target 'z' is none of the choices"),
    ],
)
def test_choices_are_two_or_more_different_strings_with_the_target_among_them(
    write_set: WriteSet, choice_task: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(GoldenSetError, match=r"items\.jsonl:1: .*") as caught:
        load_golden_set(write_set(CHOICE | changes, task=choice_task))
    assert message in str(caught.value)


def test_a_separator_inside_a_string_does_not_end_a_line(write_set: WriteSet) -> None:
    golden = load_golden_set(write_set(ITEM | {"input": "a\u2028b"}))
    assert golden.items[0].text == "a\u2028b"


@pytest.mark.parametrize("target", ["four", "[1]", "{}"])
def test_json_fields_needs_a_target_with_fields(
    write_set: WriteSet, text_task: dict[str, Any], target: str
) -> None:
    task = text_task | {"metric_list": [{"metric": "json_fields"}]}
    with pytest.raises(GoldenSetError, match=r"items\.jsonl:1: target .*json_fields"):
        load_golden_set(write_set(ITEM | {"target": target}, task=task))


@pytest.mark.parametrize(
    ("scorer", "target", "is_enough"),
    [
        ("rouge1", "?!", False),
        ("rouge1", "no", True),
        ("rougeL", "—", False),
        ("rouge2", "no", False),
        ("rouge2", "no, never", True),
        ("rouge2", "東京", True),
        ("token_f1", "...", False),
        ("token_f1", "no", True),
    ],
)
def test_a_target_without_the_words_that_its_scorer_compares_is_refused(
    write_set: WriteSet, text_task: dict[str, Any], scorer: str, target: str, is_enough: bool
) -> None:
    folder = write_set(
        ITEM | {"target": target}, task=text_task | {"metric_list": [{"metric": scorer}]}
    )
    if is_enough:
        assert load_golden_set(folder).items[0].target == target
        return
    with pytest.raises(GoldenSetError, match=rf"items\.jsonl:1: target .*{scorer} compares"):
        load_golden_set(folder)


def test_prose_needs_neither_target_nor_scorer(write_set: WriteSet) -> None:
    task = {"task": "prose", "output_type": "loglikelihood_rolling"}
    assert load_golden_set(write_set({"id": "a", "input": "text"}, task=task)).items[0].target == ""
