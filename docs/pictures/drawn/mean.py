"""KL of documents in units of the healthy twin's, against a limit."""

from __future__ import annotations

from quantgate.measure import ClusteredRatio

from .values import quantiles, shuffled
from .verdict_rows import Axis, Row, verdicts


def draw() -> str:
    rows = []
    for name, count, ratio in (
        ("128 documents, healthy", 128, 0.98),
        ("40 documents", 40, 1.2),
        ("128 documents, one bad module", 128, 1.6),
    ):
        found, dots = _documents(count, ratio)
        rows.append(Row(name, "a dot is one document", found, dots))
    return verdicts(
        "mean: is it more than rounding does?",
        "KL against the source in units of the healthy twin's; documents are what is counted.",
        gate={"metric": "quality/kl_nats.healthy.ratio", "test": "mean", "max": "1.25 x"},
        rows=rows,
        axis=Axis(0.6, 2.2, (0.6, 1.0, 1.4, 1.8, 2.2), "x"),
        limit_name="limit 1.25 x",
    )


def _documents(count: int, ratio: float) -> tuple[ClusteredRatio, tuple[float, ...]]:
    baseline = quantiles(count, 0.5, 0.02)
    ratios = shuffled(quantiles(count, 0.25, ratio))
    candidate = tuple(a * b for a, b in zip(baseline, ratios, strict=True))
    found = ClusteredRatio(
        metric="quality/kl_nats.healthy.ratio",
        source="picture",
        baseline=baseline,
        candidate=candidate,
    )
    return found, tuple(ratios)
