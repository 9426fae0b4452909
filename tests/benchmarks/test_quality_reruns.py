"""Resampling of reruns: what it draws, and that it sees a gate that fails."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quantgate.gate import Gate
from quantgate.measure import Binomial, Clustered, PairedBinary, Scalar
from quantgate.policy import load_policy

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality_reruns.py"


@pytest.fixture
def reruns(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("quality_reruns")


def gate(metric: str, test: str, **fields: Any) -> Gate:
    return Gate.model_validate({"id": "g", "metric": metric, "test": test, **fields})


ITEMS = PairedBinary(
    metric="quality/set.exact_match", source="s", both=380, reference_only=8, candidate_only=4,
    neither=8,
)  # fmt: skip
FAILURES = Binomial(metric="validity/set.finished", source="s", events=4, trials=400)
KL = Clustered(
    metric="quality/kl_nats.mean", source="s", unit="nats", totals=(0.5, 1.5) * 20,
    counts=(10, 20) * 20,
)  # fmt: skip


def test_the_situations_differ_and_the_first_is_how_a_release_asks(reruns: Any) -> None:
    found = reruns.situations(21)
    assert len(set(map(str, found))) == 21
    assert found[0].batching.shuffle_seed is None
    assert len({one.max_batch_size for one in found}) == 4


def test_a_resample_has_as_many_items_and_the_same_mean_in_the_long_run(reruns: Any) -> None:
    generator = np.random.default_rng(1)
    drawn = [reruns.resample(ITEMS, generator) for _ in range(2000)]
    assert {one.n for one in drawn} == {ITEMS.n}
    assert np.mean([one.reference_only for one in drawn]) == pytest.approx(8, abs=0.3)
    events = [reruns.resample(FAILURES, generator).events for _ in range(2000)]
    assert np.mean(events) == pytest.approx(4, abs=0.2)
    one = reruns.resample(KL, generator)
    assert set(zip(one.totals, one.counts, strict=True)) <= {(0.5, 10), (1.5, 20)}
    assert one.n == KL.n


def test_single_numbers_stay_as_they_were_measured(reruns: Any) -> None:
    worst = Scalar(metric="quality/kl_nats.max", source="s", value=1.0, unit="nats", n=3)
    assert reruns.resample(worst, np.random.default_rng(1)) is worst


@pytest.mark.parametrize(
    ("rule", "measured", "expected"),
    [
        (gate(ITEMS.metric, "non_inferiority", margin="2 pt"), ITEMS, False),
        (gate(KL.metric, "mean", max="0.06 nats"), KL, True),
        (gate(KL.metric, "mean", max="0.07 nats"), KL, False),
        (gate(KL.metric, "mean", min="0.08 nats"), KL, True),
        # Beyond the limit, and not shown to be: undecided is no false alarm.
        (gate(FAILURES.metric, "rate", max="0.9 %"), FAILURES, False),
        (gate(FAILURES.metric, "rate", max="0.2 %"), FAILURES, True),
        (
            gate("quality/kl_nats.max", "limit", max="1 nats"),
            Scalar(metric="quality/kl_nats.max", source="s", value=1.1, unit="nats", n=3),
            True,
        ),
    ],
)
def test_a_gate_fails_where_it_would_fail_a_release(
    reruns: Any, rule: Gate, measured: Any, expected: bool
) -> None:
    assert reruns.fails(rule, measured) is expected


def test_a_variant_is_judged_by_its_own_gates_and_the_source_by_those_of_any_scheme(
    reruns: Any,
) -> None:
    policy = load_policy(SCRIPT.parents[1] / "gates" / "policies" / "demo.cpu.yaml")
    plan = SimpleNamespace(policy=policy)
    of_source, of_int8 = (
        {gate.id for gate in reruns.quality_gates(plan, model)} for model in ("source", "int8-bnb")
    )
    assert {"kl-bf16", "kl-int8", "kl-int4", "extract-quality"} <= of_source
    assert {"kl-int8", "served-int8", "extract-quality"} <= of_int8
    assert not {"kl-bf16", "kl-int4", "served"} & of_int8
    # What a model cannot be asked about itself.
    assert not {"kl-healthy", "is-quantized", "noise-floor", "weights"} & of_source
