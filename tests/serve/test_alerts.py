"""The alert rules: every metric they name exists, every alert says what to do and is tried.

`promtool` (Debian's package prometheus) checks the expressions and runs the rules' own tests.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantgate_serve.families import FAMILIES, LAYERS, PREFIX

ALERTS = Path(__file__).resolve().parents[2] / "serve" / "alerts"
RULES = ALERTS / "quantgate.rules.yaml"
TESTS = ALERTS / "quantgate.rules.test.yaml"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (apt-get install prometheus)",
)


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def kinds() -> dict[str, str]:
    """What each series that a scrape can have is."""
    found = {PREFIX + f.name: f.kind for f in FAMILIES if f.kind != "histogram"}
    for family in FAMILIES:
        if family.kind == "histogram":
            found |= {f"{PREFIX}{family.name}{end}": "counter" for end in ("_bucket", "_count")}
    return found


ALL = alerts()
IDS = [alert["alert"] for alert in ALL]


@pytest.mark.parametrize("alert", ALL, ids=IDS)
def test_an_alert_names_only_metrics_that_exist(alert: dict[str, Any]) -> None:
    named = set(re.findall(rf"{PREFIX}\w+", alert["expr"]))
    assert named <= kinds().keys()
    assert named or alert["alert"] == "QuantgateDown"


@pytest.mark.parametrize("alert", ALL, ids=IDS)
def test_rates_are_of_counters_and_slopes_of_gauges(alert: dict[str, Any]) -> None:
    text = alert["expr"]
    for name in re.findall(rf"(?:rate|increase)\(({PREFIX}\w+)", text):
        assert kinds()[name] == "counter", name
    for name in re.findall(rf"avg_over_time\(({PREFIX}\w+)", text):
        assert kinds()[name] == "gauge", name


@pytest.mark.parametrize("alert", ALL, ids=IDS)
def test_labels_that_an_alert_selects_are_the_metrics_own(alert: dict[str, Any]) -> None:
    labels = {PREFIX + family.name: family.label for family in FAMILIES}
    for name, label in re.findall(rf"({PREFIX}\w+)\{{(\w+)", alert["expr"]):
        assert labels[re.sub(r"_(bucket|count)$", "", name)] == label


@pytest.mark.parametrize("alert", ALL, ids=IDS)
def test_an_alert_says_how_bad_where_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("warning", "critical")
    assert alert["labels"]["layer"] in LAYERS
    assert {"summary", "action"} <= alert["annotations"].keys()


def test_every_alert_is_tried_where_it_fires() -> None:
    tests = yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == set(IDS)


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    subprocess.run(["promtool", "check", "rules", RULES.name], cwd=ALERTS, check=True)


@needs_promtool
def test_the_rules_fire_where_they_must_and_only_there() -> None:
    subprocess.run(["promtool", "test", "rules", TESTS.name], cwd=ALERTS, check=True)
