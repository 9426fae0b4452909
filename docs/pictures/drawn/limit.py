"""Single numbers against a limit."""

from __future__ import annotations

from quantgate.measure import Scalar

from .verdict_rows import Axis, Row, verdicts


def draw() -> str:
    def memory(gib: float) -> Scalar:
        return Scalar(
            metric="memory/peak_bytes.max",
            source="picture",
            value=gib * 2**30,
            unit="B",
            n=1,
        )

    return verdicts(
        "limit: is one number within it?",
        "A count or a peak has no sampling error, so no interval; exactly at the limit passes.",
        gate={"metric": "memory/peak_bytes.max", "test": "limit", "max": "2 GiB"},
        rows=[
            Row("1.4 GiB", "peak memory of the server", memory(1.4)),
            Row("2.0 GiB", "exactly at the limit", memory(2.0)),
            Row("2.1 GiB", "", memory(2.1)),
        ],
        axis=Axis(1, 3, (1, 1.5, 2, 2.5, 3), "GiB"),
        limit_name="limit 2 GiB",
    )
