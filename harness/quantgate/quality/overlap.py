"""Leakage: calibrating on the golden set makes its verdicts worthless."""

from __future__ import annotations

from collections.abc import Sequence

from quantgate.quality.golden import GoldenSet
from quantgate.quality.golden_items import GoldenItem

# Shorter inputs ("hi") occur in any text without having been copied from it.
_MIN_CHARACTERS = 24


def find_overlap(calibration: Sequence[str], sets: Sequence[GoldenSet]) -> str | None:
    """Says which golden items occur in the calibration text; None when none does."""
    found = [
        f"{golden.name}/{item.id}"
        for golden in sets
        for item in golden.items
        if _occurs(item, calibration)
    ]
    if not found:
        return None
    return (
        f"{len(found)} golden items are in the calibration text (first: {', '.join(found[:3])}): "
        "the variant has seen the answers. Calibrate on other text."
    )


def _occurs(item: GoldenItem, calibration: Sequence[str]) -> bool:
    # A system prompt is shared by design: in calibration text it shows no copied item.
    messages = [m["content"] for m in item.messages or () if m["role"] != "system"]
    texts = [item.text] if item.text else messages
    return any(
        len(text) >= _MIN_CHARACTERS and any(text in document for document in calibration)
        for text in texts
    )
