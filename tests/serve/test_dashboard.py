"""The dashboard shows every metric of the table, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quantgate_serve.dashboard import build_dashboard, main
from quantgate_serve.families import FAMILIES, LAYERS, PREFIX

STORED = Path(__file__).resolve().parents[2] / "serve" / "dashboards" / "quantgate.json"
DASHBOARD = build_dashboard()


def series_of(panel: dict[str, Any]) -> set[str]:
    text = " ".join(target["expr"] for target in panel.get("targets", []))
    return set(re.findall(rf"{PREFIX}\w+", text))


def exported() -> set[str]:
    """The series' names that a scrape can have."""
    endings = {"gauge": ("",), "counter": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {PREFIX + family.name + end for family in FAMILIES for end in endings[family.kind]}


def test_the_stored_dashboard_is_the_one_that_the_table_gives() -> None:
    assert json.loads(STORED.read_text(encoding="utf-8")) == DASHBOARD, (
        "run: python -m quantgate_serve.dashboard serve/dashboards/quantgate.json"
    )


def test_no_panel_names_a_metric_that_does_not_exist() -> None:
    assert {name for panel in DASHBOARD["panels"] for name in series_of(panel)} <= exported()


def test_three_rows_are_the_three_layers_and_each_shows_all_of_its_metrics() -> None:
    rows: list[set[str]] = []
    for panel in DASHBOARD["panels"]:
        if panel["type"] == "row":
            rows.append(set())
        else:
            rows[-1] |= series_of(panel)
    assert len(rows) == len(LAYERS) == 3
    for shown, families in zip(rows, LAYERS.values(), strict=True):
        assert {
            PREFIX + f.name + ("_bucket" if f.kind == "histogram" else "") for f in families
        } == (shown)


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("time_to_first_token_seconds", "s"),
        ("kv_cache_usage_perc", "percentunit"),
        ("weight_bytes", "bytes"),
        ("generation_tokens_total per second", "short"),
    ],
)
def test_a_panel_has_its_metrics_unit(name: str, unit: str) -> None:
    (panel,) = [panel for panel in DASHBOARD["panels"] if panel["title"] == name]
    assert panel["fieldConfig"]["defaults"]["unit"] == unit


def test_the_command_writes_the_file_it_is_given(tmp_path: Path) -> None:
    assert main([str(tmp_path / "d.json")]) == 0
    assert json.loads((tmp_path / "d.json").read_text()) == DASHBOARD
    assert main([]) == 2
