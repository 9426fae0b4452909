"""When what is recorded was measured: recording can be hours later, and can be done again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from quantgate.drill.results import DrillResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """From the first to the last measurement, in ms since the epoch, as MLflow counts."""

    start_ms: int
    end_ms: int | None
    """None where an earlier version did not write it down: MLflow takes the time of recording."""


def span_of_release(state: Mapping[str, Any]) -> Span:
    """Of release.json: from where it began, also if it was cut short since."""
    measured_at = state.get("measured_at")
    return Span(
        start_ms=_epoch_ms(datetime.fromisoformat(state["started_at"])),
        end_ms=_epoch_ms(datetime.fromisoformat(measured_at)) if measured_at else None,
    )


def span_of_drill(result: DrillResult) -> Span:
    began = datetime.fromisoformat(result.taken_at)
    end = began + timedelta(seconds=result.seconds)
    return Span(start_ms=_epoch_ms(began), end_ms=_epoch_ms(end))


def _epoch_ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)
