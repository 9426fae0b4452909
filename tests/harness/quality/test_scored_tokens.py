"""The lower bound of KL between two paths, against KL over the whole vocabulary."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.errors import MeasurementError
from quantgate.quality.scored_tokens import (
    ScoredTokens,
    compare_paths,
    read_scored_tokens,
    write_scored_tokens,
)

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def scored(logits: np.ndarray, tokens: list[int], *, num_top: int) -> ScoredTokens:
    """A path's rows from [N, V] logits, as FP32 log-probabilities."""
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    log_probs = log_probs.astype(np.float32).astype(np.float64)
    order = np.argsort(-log_probs, axis=1, kind="stable")[:, :num_top]
    rows = np.arange(len(tokens))
    return ScoredTokens(
        documents=np.array(["d"] * len(tokens)),
        tags=[["a"]] * len(tokens),
        positions=rows + 1,
        token_ids=np.array(tokens),
        log_probs=log_probs[rows, tokens],
        top_ids=order,
        top_log_probs=np.take_along_axis(log_probs, order, axis=1),
    )


def exact_kl(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (first, second))
    return np.asarray((p * np.log(p / q)).sum(axis=1))


def kl(first: ScoredTokens, second: ScoredTokens) -> np.ndarray:
    return np.asarray(compare_paths(first, second)["kl_nats"].to_numpy())


@PROPERTY
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 3.0), num_top=st.integers(1, 5))
def test_the_bound_is_never_above_kl_over_the_whole_vocabulary(
    seed: int, scale: float, num_top: int
) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (20, 30))
    other = logits + generator.normal(0, scale, logits.shape)
    tokens = generator.integers(0, 30, 20).tolist()
    bound = kl(scored(logits, tokens, num_top=2 * num_top), scored(other, tokens, num_top=num_top))
    # FP32 log-probabilities are all that the bound knows.
    assert (bound <= exact_kl(logits, other) + 2e-6).all()
    assert (bound >= 0).all()


def test_where_every_token_is_named_the_bound_is_kl() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 2, (50, 12))
    other = logits + generator.normal(0, 0.5, logits.shape)
    tokens = [0] * 50
    bound = kl(scored(logits, tokens, num_top=12), scored(other, tokens, num_top=12))
    assert bound == pytest.approx(exact_kl(logits, other), abs=2e-6)


def test_a_difference_in_the_token_that_follows_shows_where_no_likely_token_is_shared() -> None:
    first = np.array([[5.0, 0.0, 0.0, 0.0]])
    second = np.array([[0.0, 5.0, 0.0, 0.0]])
    bound = kl(scored(first, [0], num_top=1), scored(second, [0], num_top=1))
    assert bound[0] == pytest.approx(exact_kl(first, second)[0], rel=0.2)


def test_a_path_does_not_differ_from_itself() -> None:
    rows = scored(np.random.default_rng(1).normal(0, 3, (40, 30)), list(range(20)) * 2, num_top=4)
    assert kl(rows, rows).tolist() == [0.0] * 40


def test_a_value_that_is_not_finite_is_counted_and_leaves_no_nan() -> None:
    rows = scored(np.zeros((2, 4)), [0, 1], num_top=2)
    spoiled = scored(np.zeros((2, 4)), [0, 1], num_top=2)
    spoiled.log_probs[1] = math.nan
    for table in (compare_paths(rows, spoiled), compare_paths(spoiled, rows)):
        assert table["is_finite"].to_pylist() == [True, False]
        for name in ("kl_nats", "reference_nll_nats", "candidate_nll_nats", "rest"):
            assert np.isfinite(table[name].to_numpy()).all()


def test_other_tokens_are_an_error_and_never_compared() -> None:
    first = scored(np.zeros((2, 4)), [0, 1], num_top=2)
    with pytest.raises(MeasurementError, match="not score the same tokens"):
        compare_paths(first, scored(np.zeros((2, 4)), [0, 2], num_top=2))
    with pytest.raises(MeasurementError, match="not score the same tokens"):
        compare_paths(first, scored(np.zeros((1, 4)), [0], num_top=2))


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    rows = {
        "document": ["d", "d"],
        "tags": [["a"], ["a"]],
        "position": [1, 2],
        "token_id": [7, 8],
        "log_prob": [-0.5, -1.5],
        "top_ids": [[7, 1], [2, 8]],
        "top_log_probs": [[-0.5, -2.0], [-1.0, -1.5]],
    }
    write_scored_tokens(tmp_path / "x.parquet", rows)
    back = read_scored_tokens(tmp_path / "x.parquet")
    assert back.documents.tolist() == rows["document"]
    assert back.tags == rows["tags"]
    assert back.top_ids.tolist() == rows["top_ids"]
    assert back.log_probs.tolist() == rows["log_prob"]


def test_rows_of_unequal_length_are_refused(tmp_path: Path) -> None:
    rows = {
        "document": ["d", "d"],
        "tags": [[], []],
        "position": [1, 2],
        "token_id": [7, 8],
        "log_prob": [-0.5, -1.5],
        "top_ids": [[7, 1], [2]],
        "top_log_probs": [[-0.5, -2.0], [-1.0]],
    }
    write_scored_tokens(tmp_path / "x.parquet", rows)
    with pytest.raises(MeasurementError, match="not the same number of likely tokens"):
        read_scored_tokens(tmp_path / "x.parquet")
