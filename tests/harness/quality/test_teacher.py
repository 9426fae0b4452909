"""KL, agreement and NLL, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from quantgate.quality.teacher import (
    COLUMNS,
    NUM_TOP,
    best_tokens,
    compare,
    divergence,
    expect,
)

IDS = [0, 1, 0]


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([*rows, [0.0] * len(rows[0])])


def compare_logits(
    reference: torch.Tensor, candidate: torch.Tensor, ids: list[int]
) -> dict[str, torch.Tensor]:
    expected = expect(reference, ids)
    found = compare(expected, candidate)
    # A twin is asked for nothing else, and gets the same numbers.
    assert torch.equal(divergence(expected, candidate), found["kl_nats"])
    return found


def test_identical_logits_have_no_divergence() -> None:
    same = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    found = compare_logits(same, same.clone(), IDS)
    assert found["kl_nats"].tolist() == [0.0, 0.0]
    assert found["is_top1_equal"].all()
    assert torch.equal(found["reference_nll_nats"], found["candidate_nll_nats"])


def test_divergence_is_from_the_reference_to_the_candidate_in_nats() -> None:
    reference = logits([math.log(3.0), 0.0], [0.0, 0.0])  # (3/4, 1/4), (1/2, 1/2)
    candidate = logits([0.0, 0.0], [0.0, math.log(3.0)])  # (1/2, 1/2), (1/4, 3/4)
    found = compare_logits(reference, candidate, IDS)
    by_hand = [
        0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5),
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
    ]
    # FP32 log-softmax.
    assert found["kl_nats"].tolist() == pytest.approx(by_hand, abs=1e-6)
    # The next tokens are 1 and 0.
    assert found["reference_nll_nats"].tolist() == pytest.approx([math.log(4), math.log(2)])
    assert found["candidate_nll_nats"].tolist() == pytest.approx([math.log(2), math.log(4)])


def test_a_long_document_is_compared_like_its_rows_alone() -> None:
    random = torch.Generator().manual_seed(3)
    reference, candidate = torch.randn(2, 70, 50, generator=random)
    found = compare_logits(reference, candidate, [1] * 70)
    p, q = (torch.log_softmax(rows[:-1].double(), dim=-1) for rows in (reference, candidate))
    assert found["kl_nats"].tolist() == pytest.approx(
        (p.exp() * (p - q)).sum(-1).tolist(), abs=1e-6
    )


def test_the_top_tokens_are_compared_position_by_position() -> None:
    found = compare_logits(logits([1.0, 0.0], [1.0, 0.0]), logits([2.0, 0.0], [0.0, 2.0]), IDS)
    assert found["is_top1_equal"].tolist() == [True, False]


def test_a_constant_added_to_all_logits_is_no_difference() -> None:
    reference = logits([1.0, 2.0], [3.0, 0.0])
    # 4 is exact in FP32 at these sizes.
    assert compare_logits(reference, reference + 4.0, IDS)["kl_nats"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_a_logit_that_is_not_finite_is_counted_and_leaves_no_nan(side: str, value: float) -> None:
    pair = {
        "reference": logits([1.0, 0.0], [1.0, 0.0]),
        "candidate": logits([1.0, 0.0], [1.0, 0.0]),
    }
    pair[side][1, 1] = value
    found = compare_logits(**pair, ids=IDS)
    assert found["is_finite"].tolist() == [True, False]
    for name in ("kl_nats", "reference_nll_nats", "candidate_nll_nats"):
        assert found[name][1] == 0.0


def test_the_last_position_predicts_nothing_and_is_not_compared() -> None:
    candidate = logits([1.0, 0.0], [1.0, 0.0])
    candidate[-1, 0] = math.nan
    assert compare_logits(logits([1.0, 0.0], [1.0, 0.0]), candidate, IDS)["is_finite"].all()


@pytest.mark.parametrize("width", [2, 4])
def test_another_vocabulary_is_an_error_and_never_cut_to_fit(width: int) -> None:
    with pytest.raises(ValueError, match="vocabulary was truncated or extended"):
        compare_logits(torch.zeros(3, 3), torch.zeros(3, width), IDS)


def test_the_columns_are_those_that_are_stored() -> None:
    found = compare_logits(torch.zeros(3, 3), torch.zeros(3, 3), IDS)
    found |= best_tokens(torch.zeros(3, 3))
    assert {"document", "tags", "position", "token_id", "healthy_kl_nats", *found} == set(COLUMNS)


def test_the_best_tokens_are_those_of_the_whole_vocabulary_with_their_log_probabilities() -> None:
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    found = best_tokens(rows)
    expected = torch.log_softmax(rows[:-1], dim=-1).topk(NUM_TOP, dim=-1)
    assert torch.equal(found["candidate_top_ids"], expected.indices)
    assert torch.allclose(found["candidate_top_log_probs"], expected.values, atol=1e-6)
    assert best_tokens(torch.zeros(3, 3))["candidate_top_ids"].shape == (2, 3)


def test_the_margin_is_between_the_first_two_choices_of_the_reference() -> None:
    reference = logits([math.log(6.0), math.log(3.0), 0.0], [0.0, 0.0, 0.0])
    found = compare_logits(reference, torch.zeros(3, 3), IDS)
    assert found["reference_margin"].tolist() == pytest.approx([0.3, 0.0], abs=1e-6)
