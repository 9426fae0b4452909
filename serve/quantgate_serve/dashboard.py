"""Writes the Grafana dashboard from the table of families: three rows, one for each layer.

`python -m quantgate_serve.dashboard serve/dashboards/quantgate.json`. A panel can only name a
metric that the table has, and each metric of the table has a panel.
"""

import json
import sys
from pathlib import Path
from typing import Any

from quantgate_serve.families import FAMILIES, LAYERS, PREFIX, Family

Json = dict[str, Any]

_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3
_SELECTOR = 'instance=~"$instance", model_name=~"$model_name"'
_TITLES = {"queue": "Queue: who waits, how long, who is turned away",
           "serving": "Serving: how full the batches are, what caches save, what clients see",
           "device": "Device: how near the hardware is to what it can do"}  # fmt: skip
# What two counters say together, shown before the panels of their layer.
_SHARES = {
    "serving": (
        ("Prefix cache hit share", "prefix_cache_hits_total", "prefix_cache_queries_total"),
        (
            "Share of gathered KV pages that hold tokens",
            "needed_kv_pages_total",
            "gathered_kv_pages_total",
        ),
    ),
}
_UNITS = {
    "_bytes_per_second": "Bps",
    "_flops_per_second": "flops",
    "_per_second": "short",
    "_seconds": "s",
    "_seconds_total": "s",
    "_bytes": "bytes",
    "_perc": "percentunit",
    "_ratio": "percentunit",
    "_watts": "watt",
    "_celsius": "celsius",
    "_hertz": "hertz",
}


def build_dashboard() -> Json:
    """The dashboard as Grafana imports it."""
    panels: list[Json] = []
    top = 0
    for layer, families in LAYERS.items():
        panels.append(_row(_TITLES[layer], top))
        top += 1
        shown = [_share_panel(*share) for share in _SHARES.get(layer, ())]
        shown += [_panel(family) for family in families]
        for index, panel in enumerate(shown):
            line, column = divmod(index, _COLUMNS)
            panel["gridPos"] = {
                "x": column * _WIDTH,
                "y": top + line * _HEIGHT,
                "w": _WIDTH,
                "h": _HEIGHT,
            }
            panels.append(panel)
        top += -(-len(shown) // _COLUMNS) * _HEIGHT
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "uid": "quantgate-serve",
        "title": "quantgate serve",
        "tags": ["quantgate"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), *map(_variable, ("instance", "model_name"))]},
        "panels": panels,
    }


def _panel(family: Family) -> Json:
    name, by = PREFIX + family.name, "" if family.label is None else f", {family.label}"
    legend = "{{instance}}" if family.label is None else "{{instance}} {{" + family.label + "}}"
    if family.kind == "histogram":
        rate = f"sum by (instance, le{by}) (rate({name}_bucket{{{_SELECTOR}}}[$__rate_interval]))"
        targets = [
            (f"histogram_quantile({q / 100}, {rate})", f"p{q} {legend}") for q in (50, 95, 99)
        ]
    elif family.kind == "counter":
        series = f"rate({name}{{{_SELECTOR}}}[$__rate_interval])"
        targets = [(f"sum by (instance{by}) ({series})", legend)]
    else:
        targets = [(f"{name}{{{_SELECTOR}}}", legend)]
    per_second = " per second" if family.kind == "counter" else ""
    return _timeseries(
        family.name + per_second, family.text, targets, "short" if per_second else _unit(family)
    )


def _share_panel(title: str, part: str, whole: str) -> Json:
    rates = [f"rate({PREFIX}{name}{{{_SELECTOR}}}[$__rate_interval])" for name in (part, whole)]
    return _timeseries(
        title, f"{part} over {whole}.", [(" / ".join(rates), "{{instance}}")], "percentunit"
    )


def _unit(family: Family) -> str:
    # The longest ending that fits: bytes per second are no bytes.
    fitting = [ending for ending in _UNITS if family.name.endswith(ending)]
    return _UNITS[max(fitting, key=len)] if fitting else "short"


def _timeseries(title: str, text: str, targets: list[tuple[str, str]], unit: str) -> Json:
    return {
        "type": "timeseries",
        "title": title,
        "description": text,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend}
            for number, (expression, legend) in enumerate(targets)
        ],
    }


def _row(title: str, top: int) -> Json:
    place = {"x": 0, "y": top, "w": _WIDTH * _COLUMNS, "h": 1}
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place}


def _source() -> Json:
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _variable(name: str) -> Json:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values({PREFIX}{FAMILIES[0].name}, {name})",
        "includeAll": True,
        "multi": True,
        "refresh": 2,
    }


def main(arguments: list[str]) -> int:
    """Write the dashboard to the path given."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m quantgate_serve.dashboard FILE.json\n")
        return 2
    Path(arguments[0]).write_text(json.dumps(build_dashboard(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
