"""The p95 of requests against a limit."""

from __future__ import annotations

from quantgate.measure import Latencies

from .values import quantiles
from .verdict_rows import Axis, Row, verdicts


def draw() -> str:
    rows = []
    for name, note, arguments in (
        ("1,000 requests", "dots: slower than 500 ms", (1000, 330)),
        ("150 requests", "p95 seen below the limit", (150, 340)),
        ("1,000 requests, 60 failed", "a failure is infinitely late", (1000, 330, 60)),
    ):
        found, dots = _requests(*arguments)
        rows.append(Row(name, note, found, dots))
    return verdicts(
        "percentile: is p95 within the limit?",
        "The interval of the percentile itself, from the number of late requests alone.",
        gate={
            "metric": "perf/e2e_ms.p95",
            "test": "percentile",
            "percentile": 95.0,
            "max": "800 ms",
        },
        rows=rows,
        axis=Axis(400, 1200, (400, 600, 800, 1000, 1200), "ms"),
        limit_name="limit 800 ms",
    )


def _requests(count: int, middle: float, failed: int = 0) -> tuple[Latencies, tuple[float, ...]]:
    values = quantiles(count - failed, 0.45, middle)
    found = Latencies(
        metric="perf/e2e_ms.p95", source="picture", unit="ms", values=values, failed=failed
    )
    return found, tuple(value for value in values if value > 500)
