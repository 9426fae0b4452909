"""Shares of invalid outputs against a limit."""

from __future__ import annotations

from quantgate.measure import Binomial

from .verdict_rows import Axis, Row, verdicts


def draw() -> str:
    def share(events: int, trials: int) -> Binomial:
        return Binomial(
            metric="validity/set.json_schema", source="picture", events=events, trials=trials
        )

    return verdicts(
        "rate: how often may it happen, at most?",
        "New invalid outputs. None seen is not none: 100 items without one still allow 3 %.",
        gate={"metric": "validity/set.json_schema", "test": "rate", "max": "1 %"},
        rows=[
            Row("0 of 299", "the fewest that prove 1 %", share(0, 299)),
            Row("0 of 100", "none seen, little shown", share(0, 100)),
            Row("3 of 1,000", "a few, and enough items", share(3, 1000)),
            Row("12 of 480", "2.5 % seen", share(12, 480)),
        ],
        axis=Axis(0, 5, (0, 1, 2, 3, 4, 5), "%"),
        limit_name="limit 1 %",
    )
