"""Calibration text against the same tokens in random order, read by the demo model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from quantgate.variants.calibration import CalibrationSet, load_calibration
from quantgate.variants.source import demo_folder, open_source
from quantgate.variants.surprise import MAX_TOKENS, _sample, surprise_ratio

CALIBRATION = Path(__file__).parents[3] / "harness" / "quantgate" / "demo" / "calibration.jsonl"


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_folder()).eval()


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    return load_calibration(CALIBRATION, open_source("demo"), max_documents=32, max_tokens=512)


def test_text_surprises_its_model_less_than_the_same_tokens_shuffled(
    demo: Any, text: CalibrationSet
) -> None:
    ratio = surprise_ratio(demo, text.ids)
    assert ratio is not None
    assert ratio < 0.7


def test_random_tokens_surprise_it_as_much_in_any_order(demo: Any, text: CalibrationSet) -> None:
    generator = random.Random(1)
    known = sorted({token for ids in text.ids for token in ids})
    tokens = [[generator.choice(known) for _ in ids] for ids in text.ids]
    assert surprise_ratio(demo, tokens) == pytest.approx(1.0, abs=0.02)


def test_documents_of_one_token_say_nothing(demo: Any) -> None:
    assert surprise_ratio(demo, [[5], []]) is None


@pytest.mark.parametrize(
    ("lengths", "count"), [([100] * 10, 1000), ([100] * 1000, MAX_TOKENS), ([9000], MAX_TOKENS)]
)
def test_a_sample_is_bounded_and_spread_over_the_documents(lengths: list[int], count: int) -> None:
    documents = [[number] * length for number, length in enumerate(lengths)]
    sample = _sample(documents)
    assert sum(map(len, sample)) == count
    assert max(ids[0] for ids in sample) >= 0.8 * (len(lengths) - 1)
