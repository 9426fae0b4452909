"""A gate may not ask for less than the reference differs from itself: the rule at its edges."""

from __future__ import annotations

from typing import Any

import pytest

from quantgate.gate import Gate
from quantgate.measure import Missing, Scalar
from quantgate.resolution import has_noise_floor, why_too_fine


def gate(metric: str, test: str, **fields: Any) -> Gate:
    return Gate.model_validate({"id": "g", "metric": metric, "test": test, **fields})


def floor(rule: Gate, value: float, unit: str) -> dict[str, Scalar | Missing]:
    found = Scalar(
        metric=rule.metric, source="again.parquet", value=value, unit=unit, n=9, note="3 of 400"
    )
    return {rule.metric: found}


ITEMS = gate("quality/set.exact_match", "non_inferiority", margin="2 pt")
INVALID_OUTPUT = gate("validity/set.finished", "rate", max="1 %")
KL = gate("quality/kl_nats.mean", "mean", max="0.001 nats")
QUANTIZED = gate("quality/kl_nats.mean", "mean", min="0.001 nats")
TAIL = gate("quality/kl_nats.p99", "limit", max="0.01 nats")
SERVED = gate("quality/served_kl_nats.mean", "mean", max="0.00001 nats")
WORST = gate("quality/served_logprob_difference_nats.max", "limit", max="0.001 nats")
TOP1 = gate("quality/top1_agreement.rate", "mean", min="99 %")
LENGTH = gate("validity/set.output_tokens.ratio", "mean", max="1.25 x")
PERPLEXITY = gate("quality/perplexity.ratio", "mean", max="1.25 x")


@pytest.mark.parametrize(
    ("rule", "distance", "unit"),
    [
        (ITEMS, 0.02, "1"),
        (INVALID_OUTPUT, 0.01, "1"),
        (KL, 0.001, "nats"),
        (QUANTIZED, 0.001, "nats"),
        (TAIL, 0.01, "nats"),
        (SERVED, 0.00001, "nats"),
        (WORST, 0.001, "nats"),
        (TOP1, 1 - 0.99, "1"),
        (PERPLEXITY, 0.25, "x"),
        (LENGTH, 0.25, "x"),
    ],
    ids=lambda value: value.metric if isinstance(value, Gate) else None,
)
def test_a_gate_may_be_as_fine_as_the_floor_and_no_finer(
    rule: Gate, distance: float, unit: str
) -> None:
    assert why_too_fine(rule, floor(rule, 0.0, unit)) is None
    assert why_too_fine(rule, floor(rule, distance * 0.99, unit)) is None
    assert why_too_fine(rule, floor(rule, distance, unit)) is None
    reason = why_too_fine(rule, floor(rule, distance * 1.01, unit))
    assert reason is not None
    assert "finer than the noise floor" in reason
    assert "(3 of 400)" in reason


def test_a_floor_that_was_not_measured_lets_no_gate_judge() -> None:
    assert why_too_fine(ITEMS, {}) == (
        "no noise floor: the reference was not measured against itself"
    )
    missing = Missing(metric=ITEMS.metric, reason="the server exited (exit code 1)")
    assert why_too_fine(ITEMS, {ITEMS.metric: missing}) == (
        "no noise floor: the server exited (exit code 1)"
    )


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("quality/set.tag-long.exact_match", True),
        ("quality/kl_nats.from-256.mean", True),
        ("quality/top1_agreement.confident.rate", True),
        ("quality/kl_nats.healthy.ratio", False),
        ("quality/served_logprob_difference_nats.reference.ratio", False),
        ("quality/non_finite.count", False),
        ("divergence/set.same.rate", False),
        ("quality/noise_floor_kl_nats.mean", False),
        ("perf/e2e_ms.p95", False),
        ("audit/weight_error.ratio", False),
    ],
)
def test_quality_relative_to_the_reference_has_a_floor(metric: str, expected: bool) -> None:
    assert has_noise_floor(metric) is expected


def test_a_gate_without_a_noise_floor_is_not_held_up_by_its_absence() -> None:
    assert why_too_fine(gate("memory/peak_bytes.max", "limit", max="1 GiB"), {}) is None
