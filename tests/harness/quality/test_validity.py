"""Checks on an output that need no known answer."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from quantgate.quality.answers import Answer
from quantgate.quality.repetition import share_repeated
from quantgate.quality.scripts import share_in_scripts
from quantgate.quality.task import Task
from quantgate.quality.validity import ValidityCheck, is_valid

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
LATIN = {"type": "script", "scripts": ["Latin"]}
GREEK_TOO = {"type": "script", "scripts": ["Latin", "Greek"], "min_share": 0.75}
LOOP = {"type": "repetition", "ngram": 2, "max_share": 0.5}


def answer(output: str = "x", finish_reason: str = "stop", **changes: Any) -> Answer:
    return Answer(item_id="a", output=output, finish_reason=finish_reason, **changes)


def check(**fields: Any) -> ValidityCheck:
    return ValidityCheck.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "output", "expected"),
    [
        ({"type": "non_empty"}, "x", True),
        ({"type": "non_empty"}, " \n", False),
        ({"type": "regex", "pattern": "[0-9]+"}, " 12\n", True),
        ({"type": "regex", "pattern": "[0-9]+"}, "12a", False),
        ({"type": "regex", "pattern": "[0-9]+"}, "", False),
        ({"type": "json_schema", "schema": SCHEMA}, '{"n": 1}', True),
        ({"type": "json_schema", "schema": SCHEMA}, '{"n": "1"}', False),
        ({"type": "json_schema", "schema": SCHEMA}, "{}", False),
        ({"type": "json_schema", "schema": SCHEMA}, '{"n": 1', False),
        ({"type": "json_schema", "schema": SCHEMA}, "[" * 100_000, False),
        (LATIN, "Größe: 4 µm", True),
        (LATIN, "Größe: 4 м", False),
        # Digits and signs belong to every script, but nothing at all is no answer in any.
        (LATIN, "42 %", True),
        (LATIN, " \n", False),
        (GREEK_TOO, "abc λ д", True),
        (GREEK_TOO, "ab λ д", True),
        (GREEK_TOO, "a λ д", False),
    ],
)
def test_an_output_is_valid_only_when_it_passes(
    fields: dict[str, Any], output: str, expected: bool
) -> None:
    assert is_valid(check(**fields), answer(output)) is expected


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason", "is_finished", "is_ended"),
    [
        ("stop", None, True, True),
        ("stop", "\n", True, False),
        ("length", None, False, False),
        ("error", None, False, False),
    ],
)
def test_finished_is_not_cut_at_the_limit_and_end_token_is_not_cut_at_a_stop_string_either(
    finish_reason: str, stop_reason: str | None, is_finished: bool, is_ended: bool
) -> None:
    one = answer(finish_reason=finish_reason, stop_reason=stop_reason)
    assert is_valid(check(type="finished"), one) is is_finished
    assert is_valid(check(type="end_token"), one) is is_ended


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [
        ((), 0.0),
        ((1,), 0.0),
        ((1, 2), 0.0),
        ((1, 2, 3), 0.0),
        # 12 21 12: one of three.
        ((1, 2, 1, 2), 1 / 3),
        # 77 77 77: two of three.
        ((7, 7, 7, 7), 2 / 3),
    ],
)
def test_the_share_of_bigrams_that_stood_there_before(
    token_ids: tuple[int, ...], share: float
) -> None:
    assert share_repeated(token_ids, 2) == share


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [((1, 2, 1, 2), True), ((7, 7, 7), True), ((7, 7, 7, 7), False), ((), True)],
)
def test_repetition_is_valid_up_to_its_share(token_ids: tuple[int, ...], expected: bool) -> None:
    assert is_valid(check(**LOOP), answer(token_ids=token_ids)) is expected


@pytest.mark.parametrize(
    ("text", "scripts", "share"),
    [
        ("", ["Latin"], None),
        ("12, 3.", ["Latin"], None),
        ("abc", ["latin"], 1.0),
        ("слово word", ["Cyrillic"], 5 / 9),
        # The long-vowel sign stands in both kana scripts, and combining accents in all.
        ("ラーメン", ["Katakana"], 1.0),
        ("ラーメン", ["Hiragana"], 1 / 4),
        ("e\u0301a", ["Latin"], 1.0),
        ("漢字かな", ["Han", "Hiragana"], 1.0),
        ("한국어", ["Han"], 0.0),
    ],
)
def test_the_share_of_letters_in_a_script(
    text: str, scripts: list[str], share: float | None
) -> None:
    assert share_in_scripts(text, scripts) == share


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "script"}, r"needs `scripts`; write: scripts: \[Latin\]"),
        ({"type": "script", "scripts": []}, "scripts"),
        ({"type": "script", "scripts": ["Klingon"]}, "'Klingon' is not a Unicode script"),
        ({"type": "script", "scripts": ["Latin}|."]}, "is not a Unicode script"),
        (LATIN | {"min_share": 0}, "min_share"),
        (LATIN | {"min_share": 1.5}, "min_share"),
        ({"type": "repetition", "ngram": 3}, "needs `max_share`"),
        ({"type": "repetition", "max_share": 0.2}, "needs `ngram`"),
        (LOOP | {"max_share": 1}, "max_share"),
        (LOOP | {"ngram": 0}, "ngram"),
        ({"type": "finished", "min_share": 1}, "`min_share` is not for type finished; remove it"),
        ({"type": "regex", "pattern": "x", "schema": {}}, "`schema` is not for type regex"),
    ],
)
def test_a_check_without_what_it_needs_or_with_more_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        check(**fields)


def test_a_kind_of_check_that_was_added_leaves_the_locks_of_older_ones_as_they_were() -> None:
    def dumped(fields: dict[str, Any]) -> Any:
        task = {"task": "t", "output_type": "generate_until", "metric_list": [METRIC]}
        (found,) = Task.model_validate(task | {"validity": [fields]}).model_dump(
            mode="json", by_alias=True
        )["validity"]
        return found

    assert dumped({"type": "finished"}) == {"type": "finished", "schema": None, "pattern": None}
    assert dumped(LATIN) == {
        "type": "script",
        "schema": None,
        "pattern": None,
        "scripts": ["Latin"],
    }


METRIC = {"metric": "exact_match"}
