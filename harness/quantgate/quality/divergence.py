"""Where greedy answers part: how many are the same, and after how many tokens the others differ.

Reported, never gated. One near-tie that falls the other way changes every token after it, so sound
variants part too, and how early says more about the prompts than about the damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from quantgate.measure import Binomial, Measurement, Missing, Scalar, percentile

SAME_RATE = "same_answer.rate"
SHARED_TOKENS = "shared_tokens.median"


def divergence(
    name: str,
    reference: Sequence[Sequence[int]],
    candidate: Sequence[Sequence[int]],
    *,
    source: str,
) -> list[Measurement]:
    """Both arms' token ids item by item, as two measurements of the golden set `name`."""
    shared = [num_shared(ours, theirs) for ours, theirs in zip(candidate, reference, strict=True)]
    parted = [count for count in shared if count is not None]
    same = Binomial(
        metric=f"divergence/{name}.{SAME_RATE}",
        events=len(shared) - len(parted),
        trials=len(shared),
        source=source,
    )
    metric = f"divergence/{name}.{SHARED_TOKENS}"
    median = percentile(parted, 50.0) if parted else None
    if median is None:
        return [same, Missing(metric=metric, reason="no answer differs", source=source)]
    note = f"of the {len(parted):,} answers of {len(shared):,} that differ"
    return [
        same,
        Scalar(
            metric=metric, value=median, unit="count", n=len(parted), note=note, source=source
        ),
    ]  # fmt: skip


def num_shared(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Tokens before the first one that differs; None for the same answer.

    Where one answer only goes on, the first differing token is the one that the other lacks.
    """
    # No token is None, so an answer that ended differs from one that goes on.
    for position, (one, other) in enumerate(zip_longest(ours, theirs)):
        if one != other:
            return position
    return None
