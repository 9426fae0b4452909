"""A table becomes a golden set that a served model is judged by, command by command."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantgate.cli import app
from quantgate.gate import Gate
from quantgate.measure import PairedBinary
from quantgate.quality.golden import GoldenSet, load_golden_set
from quantgate.quality.results import reduce_golden_set
from quantgate.quality.stage import ServedModel, measure_quality
from quantgate.server import ServerOptions
from quantgate.server_pool import ServerPool
from quantgate.variants.source import demo_folder
from quantgate.verdict import judge

ROUTE = Path(__file__).parents[4] / "golden_sets" / "order-route"
NUM_ITEMS = 20


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first items of order-route as somebody keeps them in a spreadsheet."""
    path = tmp_path_factory.mktemp("table") / "queues.csv"
    items = load_golden_set(ROUTE).items[:NUM_ITEMS]
    choices = [f"queue {i}" for i in range(len(items[0].choices))]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "message", *choices, "right", "template"])
        for item in items:
            right = choices[item.choices.index(item.target)]
            text = (item.messages or ())[0]["content"]
            writer.writerow([item.id, text, *item.choices, right, item.cluster])
    return path


@pytest.fixture(scope="module")
def golden(table: Path) -> GoldenSet:
    folder = table.parent / "golden_sets" / "queues"
    header = table.read_text(encoding="utf-8").splitlines()[0].split(",")
    choices = ",".join(name for name in header if name.startswith("queue "))
    run("from-csv", str(table), "--out", str(folder), "--prompt", "message", "--answer", "right",
        "--choices", choices, "--id", "key", "--cluster", "template", "--chat")  # fmt: skip
    return load_golden_set(folder)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["golden", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_items_are_those_the_table_was_made_of(golden: GoldenSet) -> None:
    original = [item.canonical() | {"tags": []} for item in load_golden_set(ROUTE).items]
    assert [item.canonical() for item in golden.items] == original[:NUM_ITEMS]


def test_an_imported_set_is_locked_checked_planned_and_judged(
    golden: GoldenSet, tmp_path: Path
) -> None:
    folder = str(golden.folder)
    assert f"locked {NUM_ITEMS} items" in run("lock", folder, "--model", "demo")
    assert f"{NUM_ITEMS} items, unchanged" in run("check", folder, "--model", "demo")
    assert f"queues: {NUM_ITEMS} items in" in run("stats", folder, "--margin", "20")

    with ServerPool(ServerOptions(threads=1, max_batch_size=8), keeps_running=False) as servers:
        result = measure_quality(
            ServedModel(name="source", folder=demo_folder(), artifact_sha256="0" * 64),
            [golden],
            store=tmp_path,
            log=tmp_path / "server.log",
            servers=servers,
            timeout_s=60,
            on_answers=lambda _: None,
        )
    assert dict(result.missing) == {}
    answers = result.items["queues"]
    (measured,) = reduce_golden_set(golden, answers, answers, source="queues.parquet")
    assert isinstance(measured, PairedBinary)
    assert measured.metric == "quality/queues.exact_match"
    # The demo model answers 95.8 % of the whole set.
    assert measured.both >= 0.8 * NUM_ITEMS
    gate = Gate.model_validate(
        {"id": "q", "metric": measured.metric, "test": "non_inferiority", "margin": "20 pt"}
    )
    assert judge(gate, measured, variant="source", baseline="source").outcome == "PASS"
