"""Pairs of blocks against the champion."""

from __future__ import annotations

from quantgate.measure import PairedBlocks

from .verdict_rows import Axis, Row, verdicts


def draw() -> str:
    rows = []
    for name, values in (
        ("6 pairs of blocks", (1.01, 1.04, 0.99, 1.03, 1.02, 1.05)),
        ("4 noisy pairs", (0.93, 1.12, 1.02, 1.10)),
        ("6 pairs of blocks", (1.16, 1.21, 1.14, 1.19, 1.23, 1.15)),
    ):
        found, dots = _blocks(*values)
        rows.append(Row(name, "a dot is one pair", found, dots))
    return verdicts(
        "ratio: how much slower than the champion?",
        "Both arms replay the same requests; each pair of blocks gives one ratio.",
        gate={"metric": "perf/e2e_ms.p95.ratio", "test": "ratio", "max": "1.10 x"},
        rows=rows,
        axis=Axis(0.9, 1.3, (0.9, 1.0, 1.1, 1.2, 1.3), "x"),
        limit_name="limit 1.10 x",
    )


def _blocks(*ratios: float) -> tuple[PairedBlocks, tuple[float, ...]]:
    champion = tuple(400.0 for _ in ratios)
    found = PairedBlocks(
        metric="perf/e2e_ms.p95.ratio",
        source="picture",
        unit="ms",
        champion=champion,
        candidate=tuple(400.0 * ratio for ratio in ratios),
    )
    return found, ratios
