"""The golden commands, as a person reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantgate.cli_golden import golden_app

SETS = Path(__file__).parents[2] / "golden_sets"


def stats(name: str, *arguments: str) -> str:
    result = CliRunner().invoke(golden_app, ["stats", str(SETS / name), *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_stats_say_which_margin_the_items_resolve_and_how_many_are_missing() -> None:
    shown = stats("order-extract", "--margin", "2")
    assert "order-extract: 480 items in" in shown
    assert "2% of items differ: resolves 1.86 pt; 2 pt needs 425 items, none missing" in shown
    assert "5% of items differ: resolves 2.71 pt; 2 pt needs 837 items, 357 missing" in shown


def test_a_finer_margin_needs_more_items() -> None:
    assert "1 pt needs 1,397 items, 917 missing" in stats("order-extract", "--margin", "1")


@pytest.mark.parametrize("name", ["order-extract"])
def test_stats_of_fractional_scores_count_clusters(name: str) -> None:
    assert "2 pt needs 149 equal clusters, and these weigh like" in stats(name)


def test_stats_of_no_power_are_refused() -> None:
    result = CliRunner().invoke(golden_app, ["stats", str(SETS / "order-extract"), "--power", "0"])
    assert result.exit_code == 2
    assert "equal to 0.5" in result.output
