"""The scorers, through `evaluate` as a release runs them."""

from __future__ import annotations

import pytest

from quantgate.quality.scoring import score_items


@pytest.mark.parametrize(
    ("output", "target", "score"),
    [
        ("4", "4", 1.0),
        (" 4\n", "4", 1.0),
        ("four", "4", 0.0),
        ("", "4", 0.0),
        ("Stock", "stock", 0.0),
    ],
)
def test_exact_match_trims_white_space_and_forgives_nothing_else(
    output: str, target: str, score: float
) -> None:
    assert score_items("exact_match", [output], [target]) == [score]


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ('{"item": "nuts", "n": 1}', 1.0),
        ('{"n": 1, "item": "nuts"}', 1.0),
        ('{"item": "nuts", "n": 2}', 0.5),
        ('{"item": "nuts"}', 0.5),
        ('{"item": "nuts", "n": 1, "due": "now", "to": "me"}', 0.5),
        ('{"item": "nuts", "n": true}', 0.5),
        ('{"item": null, "n": null}', 0.0),
        ('["nuts", 1]', 0.0),
        ('{"item": "nuts", ', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_fields_is_the_share_of_the_union_of_fields_that_are_the_same(
    output: str, score: float
) -> None:
    assert score_items("json_fields", [output], ['{"item": "nuts", "n": 1}']) == [score]


def test_scores_come_back_in_order() -> None:
    assert score_items("exact_match", ["a", "x", "c"], ["a", "b", "c"]) == [1.0, 0.0, 1.0]


def test_no_items_have_no_scores() -> None:
    assert score_items("exact_match", [], []) == []
