"""A gate as written: which test, which limit, which unit, and what the refusal says to write."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from quantgate.gate import Gate, Refused, suitable_tests
from quantgate.units import Quantity, parse_metric

QUALITY = {"id": "g", "metric": "quality/set.exact_match", "test": "non_inferiority"}
KL = {"id": "g", "metric": "quality/kl_nats.mean", "test": "mean"}
RATE = {"id": "g", "metric": "stability/error.rate", "test": "rate"}
RATIO = {"id": "g", "metric": "perf/e2e_ms.p95.ratio", "test": "ratio"}
P95 = {"id": "g", "metric": "perf/e2e_ms.p95", "test": "percentile"}
MEMORY = {"id": "g", "metric": "memory/peak_bytes.max", "test": "limit"}


def refusal(fields: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        Gate.model_validate(fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "limit", "direction"),
    [
        ({**QUALITY, "margin": "2 pt"}, Quantity(-2.0, "pt"), "min"),
        ({**KL, "max": "0.06 nats"}, Quantity(0.06, "nats"), "max"),
        ({**RATE, "max": "1 %"}, Quantity(1.0, "%"), "max"),
        ({**RATE, "min": "0.5 1"}, Quantity(0.5, "1"), "min"),
        ({**RATIO, "max": "1.10 x"}, Quantity(1.1, "x"), "max"),
        ({**P95, "percentile": 95, "max": "800 ms"}, Quantity(800.0, "ms"), "max"),
        ({**P95, "percentile": 95.0, "max": "0.8 s"}, Quantity(0.8, "s"), "max"),
        ({**MEMORY, "max": "2 GiB"}, Quantity(2.0, "GiB"), "max"),
    ],
)
def test_a_well_formed_gate_has_a_limit_and_a_direction(
    fields: dict[str, Any], limit: Quantity, direction: str
) -> None:
    gate = Gate.model_validate(fields)
    assert gate.limit == limit
    assert gate.direction == direction


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**QUALITY, "margin": "2 %"}, "a margin is a difference in pt; write: margin: 2 pt"),
        (
            {**QUALITY, "margin": 2},
            "margin 2 has no unit; expected percentage points; write: margin: 2 pt",
        ),
        ({**QUALITY, "margin": "0 pt"}, "margin 0 pt is outside 0–100 pt"),
        ({**QUALITY, "margin": "100 pt"}, "margin 100 pt is outside 0–100 pt"),
        ({**QUALITY, "max": "2 %"}, '"max" is not for test "non_inferiority"; write: margin: 1 pt'),
        (
            {**KL, "max": "60 ms"},
            'max is in "ms", but quality/kl_nats.mean is measured in nats; write: max: 60 nats',
        ),
        (
            {**KL, "max": 0.06},
            "0.06 has no unit; expected quality/kl_nats.mean in nats; write: max: 0.06 nats",
        ),
        ({**KL, "max": "0.06"}, "has no unit"),
        ({**KL, "max": "0.06 nat"}, 'did you mean "nats"'),
        ({**KL, "max": "1 nats", "min": "0 nats"}, "exactly one of max, min (found max and min)"),
        ({**KL}, 'test "mean" needs exactly one of max, min (found none); write: max: 1 nats'),
        ({**KL, "margin": "2 pt"}, '"margin" is not for test "mean"; write: max: 1 nats'),
        (
            {**RATE, "max": "1 pt"},
            'max is in "pt", but stability/error.rate is measured in % or 1; write: max: 1 %',
        ),
        ({**RATE, "max": 0.01}, "write: max: 0.01 %"),
        ({**RATE, "max": "0 %"}, "no sample can show a rate of exactly 0 %; write: max: 0.1 %"),
        (
            {**RATE, "min": "100 %"},
            "no sample can show a rate of exactly 100 %; write: min: 99.9 %",
        ),
        ({**RATE, "max": "100 %"}, "max 100 % is outside 0–100 %"),
        ({**RATE, "min": "0 %"}, "min 0 % is outside 0–100 %"),
        ({**RATIO, "max": "0 x"}, "max 0 x cannot be reached; expected more than 0"),
        ({**P95, "percentile": 95, "max": "0 ms"}, "max 0 ms cannot be reached"),
        (
            {**P95, "percentile": 95, "min": "10 ms"},
            '"min" is not for test "percentile"; write: max: 1 ms',
        ),
        ({**P95, "max": "800 ms"}, 'test "percentile" needs its percentile; write: percentile: 95'),
        (
            {**P95, "percentile": 99, "max": "800 ms"},
            "percentile 99 does not fit perf/e2e_ms.p95; write: percentile: 95",
        ),
        (
            {**MEMORY, "sequential": True, "max": "2 GiB"},
            '"sequential" is not for test "limit"; remove it',
        ),
        (
            {**MEMORY, "percentile": 95, "max": "2 GiB"},
            '"percentile" is not for test "limit"; remove it',
        ),
        (
            {**MEMORY, "test": "mean", "max": "2 GiB"},
            'test "mean" does not suit memory/peak_bytes.max; write: test: limit',
        ),
        ({**MEMORY, "metric": "memory/peak.max", "max": "2 GiB"}, "does not say its unit"),
        ({**MEMORY, "metric": "mem/peak_bytes.max", "max": 2}, 'unknown metric section "mem"'),
        ({**MEMORY, "max": 2}, "expected memory/peak_bytes.max in B or KiB or"),
        ({**MEMORY, "max": True}, "max"),
        ({**MEMORY, "metric": 3, "max": "2 GiB"}, "metric"),
        ({**MEMORY, "metric": "divergence/set.same_answer.rate", "max": "2 %"}, "never gated"),
        ({**MEMORY, "max": "2 GiB", "min-n": 3}, 'unknown key "min-n"; expected one of id, metric'),
        ({**MEMORY, "max": "2 GiB", "limt": 3, "maxx": 4}, 'unknown key "maxx"'),
        ({**MEMORY, "max": "2 GiB", "id": "a b"}, "pattern"),
        ({**MEMORY, "max": "2 GiB", "confidence": 0.5}, "greater than 0.5"),
        ({**MEMORY, "max": "2 GiB", "confidence": 1.0}, "less than 1"),
        ({**MEMORY, "max": "2 GiB", "confidence": float("nan")}, "finite"),
        ({**MEMORY, "max": "2 GiB", "min_n": 0}, "greater than or equal to 1"),
        ({**MEMORY, "max": "2 GiB", "schemes": ["int3"]}, "int4-gptq"),
        ({**MEMORY, "max": "2 GiB", "variants": []}, "at least 1"),
    ],
)
def test_a_gate_that_cannot_be_judged_is_refused(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(fields)


def test_a_gate_that_is_not_a_mapping_is_refused() -> None:
    with pytest.raises(ValidationError, match="valid dictionary"):
        Gate.model_validate("oom")


@pytest.mark.parametrize(
    ("metric", "tests"),
    [
        ("quality/set.exact_match", ("non_inferiority",)),
        ("validity/set.finished", ("rate",)),
        ("quality/kl_nats.mean", ("mean",)),
        ("quality/kl_nats.p99", ("limit",)),
        ("quality/perplexity.ratio", ("mean",)),
        ("quality/top1_agreement.rate", ("rate", "mean")),
        ("perf/output_tok_per_s.ratio", ("ratio",)),
        ("perf/e2e_ms.p95", ("percentile",)),
        ("perf/e2e_ms.mean", ("limit",)),
        ("stability/error.rate", ("rate",)),
        ("stability/oom.count", ("limit",)),
        ("quality/non_finite.count", ("limit",)),
        ("memory/peak_bytes.max", ("limit",)),
    ],
)
def test_each_metric_has_the_tests_that_suit_it(metric: str, tests: tuple[str, ...]) -> None:
    assert suitable_tests(parse_metric(metric)) == tests


def test_a_gate_made_without_validation_still_has_no_limit_by_default() -> None:
    gate = Gate.model_construct(id="g", metric="stability/oom.count", test="limit")
    with pytest.raises(Refused, match="gate g has no limit"):
        _ = gate.limit
