"""Verdicts and times as columns, for tables that are read beside those of other runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantgate.verdict import Decision


def columns_of_release(decisions: Iterable[Decision]) -> dict[str, list[Any]]:
    """The verdicts of all variants, to be read beside other releases'."""
    merged: dict[str, list[Any]] = {}
    for decision in decisions:
        for name, values in columns_of_verdicts(decision).items():
            named = [f"{decision.variant} {gate}" for gate in values] if name == "gate" else values
            merged.setdefault(name, []).extend(named)
    return merged


def columns_of_verdicts(decision: Decision) -> dict[str, list[Any]]:
    """A variant's verdicts. MLflow's table that compares runs groups rows by the first column and
    shows the second of each run, so these are gate and verdict."""
    rows = [
        {
            "gate": v.gate_id,
            "verdict": str(v.outcome),
            "variant": v.variant,
            "metric": v.metric,
            "observed": v.observed(),
            "bounds": v.bounds(),
            "limit": v.allowed(),
            "n": v.n,
            "reason": v.reason,
        }
        for v in decision.verdicts
    ]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {"gate": []}


def columns_of_seconds(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, list[Any]]:
    """What each part of each model's quality stage took, the longest first."""
    rows = [(f"{model} {part}", took) for model, of in seconds.items() for part, took in of.items()]
    rows.sort(key=lambda row: row[1], reverse=True)
    return {
        "part": [part for part, _ in rows],
        "seconds": [round(took, 1) for _, took in rows],
    }
