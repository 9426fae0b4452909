"""Where greedy answers part is reported, and no policy may gate on it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.gate import Gate, Refused
from quantgate.measure import Binomial, Missing, Scalar
from quantgate.quality.divergence import divergence, num_shared

IDS = st.lists(st.integers(0, 3), max_size=6)


@pytest.mark.parametrize(
    ("ours", "theirs", "shared"),
    [
        ([], [], None),
        ([1, 2], [1, 2], None),
        ([1, 2], [3, 2], 0),
        ([1, 2], [1, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([], [0], 0),
    ],
)
def test_the_first_token_that_differs_is_named_by_those_before_it(
    ours: list[int], theirs: list[int], shared: int | None
) -> None:
    assert num_shared(ours, theirs) == shared
    assert num_shared(theirs, ours) == shared


@settings(max_examples=100, deadline=None, derandomize=True)
@given(IDS, IDS)
def test_what_is_shared_is_the_longest_common_start(ours: list[int], theirs: list[int]) -> None:
    shared = num_shared(ours, theirs)
    if shared is None:
        assert ours == theirs
    else:
        assert ours[:shared] == theirs[:shared]
        assert ours[: shared + 1] != theirs[: shared + 1]


def test_the_share_of_same_answers_and_the_median_of_the_others() -> None:
    reference = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    candidate = [[1, 2, 3], [1, 2, 4], [1, 9, 9], [1, 2, 3, 4]]
    same, median = divergence("orders", reference, candidate, source="s")
    assert same == Binomial(
        metric="divergence/orders.same_answer.rate", events=1, trials=4, source="s"
    )
    assert median == Scalar(
        metric="divergence/orders.shared_tokens.median",
        value=2.0,
        unit="count",
        n=3,
        note="of the 3 answers of 4 that differ",
        source="s",
    )


def test_answers_that_are_all_the_same_have_no_median() -> None:
    _, median = divergence("orders", [[1]], [[1]], source="s")
    assert isinstance(median, Missing)
    assert median.reason == "no answer differs"


@pytest.mark.parametrize(
    ("metric", "gate"),
    [
        ("divergence/orders.same_answer.rate", {"test": "rate", "min": "90 %"}),
        ("divergence/orders.shared_tokens.median", {"test": "limit", "min": "20 count"}),
    ],
)
def test_a_gate_on_it_is_refused_with_the_reason(metric: str, gate: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"reported, never gated: sound variants part") as caught:
        Gate.model_validate({"id": "d", "metric": metric, **gate})
    (error,) = caught.value.errors()  # type: ignore[attr-defined]
    assert isinstance(error["ctx"]["error"], Refused)
