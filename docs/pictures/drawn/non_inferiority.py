"""Paired comparisons of items against a margin."""

from __future__ import annotations

from quantgate.measure import PairedBinary

from .verdict_rows import Axis, Row, verdicts


def draw() -> str:
    return verdicts(
        "non_inferiority: is the drop smaller than the margin?",
        "Each line is where the true difference can lie; its end towards the limit decides.",
        gate={"metric": "quality/set.exact_match", "test": "non_inferiority", "margin": "2 pt"},
        rows=[
            Row("1,600 items", "lost 16, won 12", _paired(1600, 16, 12)),
            Row("480 items", "lost 6, won 4", _paired(480, 6, 4)),
            Row("120 items, none changed", "too few to exclude 2 pt", _paired(120, 0, 0)),
            Row("1,600 items", "lost 90, won 30", _paired(1600, 90, 30)),
        ],
        axis=Axis(-6, 2, (-6, -4, -2, 0, 2), "pt"),
        limit_name="margin −2 pt",
    )


def _paired(n: int, lost: int, won: int) -> PairedBinary:
    right = round(0.9 * n)
    return PairedBinary(
        metric="quality/set.exact_match",
        source="picture",
        both=right - lost,
        reference_only=lost,
        candidate_only=won,
        neither=n - right - won,
    )
