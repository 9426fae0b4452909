"""Lengths are compared over a whole set: a fault of the end token, not of an item."""

from __future__ import annotations

import pytest

from quantgate.gate import Gate
from quantgate.measure import ClusteredRatio, Missing
from quantgate.quality.lengths import length_ratio
from quantgate.verdict import Outcome, judge

METRIC = "validity/orders.output_tokens.ratio"
CLUSTERS = [f"c{n % 40}" for n in range(80)]


def judged(reference: list[int], candidate: list[int], **limit: str) -> Outcome:
    gate = Gate.model_validate({"id": "length", "metric": METRIC, "test": "mean", **limit})
    measured = length_ratio(METRIC, reference, candidate, CLUSTERS, source="s")
    return judge(gate, measured, variant="v", baseline="source").outcome


def test_tokens_are_summed_by_cluster_in_both_arms() -> None:
    found = length_ratio(METRIC, [3, 5, 2], [4, 5, 0], ["b", "a", "b"], source="s")
    assert found == ClusteredRatio(
        metric=METRIC, source="s", baseline=(5.0, 5.0), candidate=(5.0, 4.0)
    )


def test_a_reference_that_generated_nothing_has_no_ratio() -> None:
    found = length_ratio(METRIC, [0, 0], [4, 5], ["a", "b"], source="s")
    assert isinstance(found, Missing)
    assert "generated no token" in found.reason


@pytest.mark.parametrize(
    ("factor", "longer", "shorter"),
    [
        (1.00, Outcome.PASS, Outcome.PASS),
        (1.05, Outcome.PASS, Outcome.PASS),
        (1.20, Outcome.FAIL, Outcome.PASS),
        (0.80, Outcome.PASS, Outcome.FAIL),
    ],
)
def test_a_band_around_the_reference_is_two_gates(
    factor: float, longer: Outcome, shorter: Outcome
) -> None:
    reference = [20 + n % 7 for n in range(80)]
    candidate = [round(n * factor) for n in reference]
    assert judged(reference, candidate, max="1.1 x") is longer
    assert judged(reference, candidate, min="0.9 x") is shorter


def test_one_answer_that_runs_on_decides_nothing() -> None:
    reference = [20] * 80
    assert judged(reference, [40, *reference[1:]], max="1.1 x") is Outcome.PASS
