"""The scorers, through `evaluate` as a release runs them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from quantgate.quality.scoring import score_items, scorers_sha256
from quantgate.quality.task import Task
from quantgate.quality.words import words_of


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


@pytest.mark.parametrize(
    ("output", "target", "rouge1", "rouge2", "rouge_l"),
    [
        # By hand. Six words against six, five shared; pairs: the-cat, on-the, the-mat of five
        # against five; in order: the cat on the mat.
        ("the cat sat on the mat", "the cat lay on the mat", 5 / 6, 3 / 5, 5 / 6),
        # Nothing in its place: all words, no pair; the longest order is one word.
        ("c b a", "a b c", 1.0, 0.0, 1 / 3),
        # A word counts as often as it stands in both: 2 of 4 and 2 of 2.
        ("no no no no", "no no", 2 / 3, 1 / 2, 2 / 3),
        # Case and punctuation are no difference.
        ("The CAT, sat!", "the cat sat", 1.0, 1.0, 1.0),
        ("", "the cat", 0.0, 0.0, 0.0),
        (" ?!\n", "the cat", 0.0, 0.0, 0.0),
        ("dog", "the cat", 0.0, 0.0, 0.0),
        # One word has no pair.
        ("cat", "the cat", 2 / 3, 0.0, 2 / 3),
    ],
)
def test_rouge_is_the_f_measure_of_shared_words_pairs_and_order(
    output: str, target: str, rouge1: float, rouge2: float, rouge_l: float
) -> None:
    found = [score_items(name, [output], [target])[0] for name in ("rouge1", "rouge2", "rougeL")]
    assert found == pytest.approx([rouge1, rouge2, rouge_l])


@pytest.mark.parametrize(
    ("output", "target", "score"),
    [
        ("Größe zehn", "größe zehn", 1.0),
        ("gre zehn", "größe zehn", 1 / 2),
        ("кошка спит", "кошка ест", 1 / 2),
        # Without spaces each character is a word: two of three, and two of two.
        ("東京都", "東京", 4 / 5),
        # An accent written in two characters is the same letter.
        ("cafe\u0301", "café", 1.0),
    ],
)
def test_words_are_found_in_every_script(output: str, target: str, score: float) -> None:
    assert score_items("rouge1", [output], [target]) == pytest.approx([score])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(max_codepoint=127)))
def test_in_ascii_words_are_those_of_rouge_score(text: str) -> None:
    assert words_of(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


@pytest.mark.parametrize(
    ("output", "target", "score"),
    [
        ("Denver Broncos", "the Denver Broncos!", 1.0),
        # Two of three and two of two.
        ("the Denver Broncos team", "Denver Broncos", 4 / 5),
        # A word counts as often as it stands in both: one of two, one of one.
        ("yes yes", "yes", 2 / 3),
        ("Carolina", "Denver Broncos", 0.0),
        ("", "Denver", 0.0),
        ("The!", "Denver", 0.0),
        # SQuAD takes out an apostrophe and keeps the letters around it together.
        ("it's", "its", 1.0),
        ("cafe\u0301 noir", "café", 2 / 3),
        ("Ärzte", "ärzte", 1.0),
        ("東京", "東京都", 0.0),
    ],
)
def test_token_f1_is_squads(output: str, target: str, score: float) -> None:
    assert score_items("token_f1", [output], [target]) == pytest.approx([score])


def test_the_digest_of_scorers_is_that_of_the_ones_a_task_uses() -> None:
    def digest(*names: str) -> str:
        metrics = [{"metric": name} for name in names]
        task = {"task": "t", "output_type": "generate_until", "metric_list": metrics}
        return scorers_sha256(Task.model_validate(task))

    assert digest("rouge1") != digest("rougeL") != digest("token_f1")
    assert digest("rouge1", "rougeL") == digest("rougeL", "rouge1")


def test_scores_come_back_in_order() -> None:
    assert score_items("exact_match", ["a", "x", "c"], ["a", "b", "c"]) == [1.0, 0.0, 1.0]


def test_no_items_have_no_scores() -> None:
    assert score_items("exact_match", [], []) == []


def test_scoring_brings_no_quantizers_of_torch_into_the_process() -> None:
    code = (
        "import sys; from quantgate.quality import scoring; scoring._load('exact_match'); "
        "assert not {'torchao', 'transformers.modeling_utils'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
