"""Stored answers are scored again by whoever has them, and a cell that was changed is named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from quantgate.cli import app
from quantgate.errors import ArtifactError
from quantgate.quality.answers import Answer
from quantgate.quality.golden import GoldenSet, load_golden_set
from quantgate.quality.rescoring import rescore
from quantgate.quality.results import write_results

OUTPUTS = ("0", "x", "2")
DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def golden(write_set: Callable[..., Path], text_task: dict[str, Any]) -> GoldenSet:
    lines = [{"id": f"i{n}", "input": "q", "target": str(n)} for n in range(len(OUTPUTS))]
    checks = {"validity": [{"type": "regex", "pattern": "[0-9]"}]}
    return load_golden_set(write_set(*lines, task=text_task | checks))


@pytest.fixture
def results(golden: GoldenSet, tmp_path: Path) -> Path:
    answers = [
        Answer(item_id=item.id, output=output, finish_reason="stop", token_ids=(1,))
        for item, output in zip(golden.items, OUTPUTS, strict=True)
    ]
    write_results(tmp_path / "r.parquet", golden, answers)
    return tmp_path / "r.parquet"


def change(path: Path, column: str, values: list[object]) -> None:
    table = pq.read_table(path)
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, pa.array(values)), path)


def test_results_that_nobody_touched_score_the_same(golden: GoldenSet, results: Path) -> None:
    assert rescore(golden, results) == (3, [])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("score.exact_match", [1.0, 1.0, 1.0], "i1: score.exact_match is stored as 1.0, and is 0"),
        ("valid.regex", [True, True, True], "i1: valid.regex is stored as True, and is False now"),
        ("target", ["0", "x", "2"], "i1: target is stored as x, and is 1 now"),
    ],
)
def test_a_cell_that_was_changed_is_named(
    golden: GoldenSet, results: Path, column: str, values: list[object], message: str
) -> None:
    change(results, column, values)
    _, (difference,) = rescore(golden, results)
    assert str(difference).startswith(message)
    printed = CliRunner().invoke(app, ["golden", "rescore", str(golden.folder), str(results)])
    assert printed.exit_code == 3
    assert message in printed.output


def test_an_output_that_was_changed_changes_its_scores(golden: GoldenSet, results: Path) -> None:
    change(results, "output", ["0", "1", "2"])
    _, differences = rescore(golden, results)
    assert {d.column for d in differences} == {"score.exact_match", "valid.regex"}


def test_the_command_says_that_nothing_differs(golden: GoldenSet, results: Path) -> None:
    printed = CliRunner().invoke(app, ["golden", "rescore", str(golden.folder), str(results)])
    assert printed.exit_code == 0
    assert "3 answers score as stored" in printed.output


def test_a_file_that_holds_no_results_of_the_set_is_refused(
    golden: GoldenSet, results: Path, tmp_path: Path
) -> None:
    change(results, "id", ["i0", "i1", "z"])
    with pytest.raises(ArtifactError, match="not results of"):
        rescore(golden, results)
    (tmp_path / "no.parquet").write_bytes(b"no")
    with pytest.raises(ArtifactError, match=r"no\.parquet: not a file of results"):
        rescore(golden, tmp_path / "no.parquet")


def test_the_recipe_of_the_documents_compares_two_files_without_quantgate(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe,) = re.findall(r"```python\n(.*?)```", (DOCS / "quality.md").read_text("utf-8"), re.S)
    for name in ("source", "int8-bnb"):
        (tmp_path / name).mkdir()
        shutil.copyfile(results, tmp_path / name / "order-total.parquet")
    change(tmp_path / "int8-bnb" / "order-total.parquet", "score.exact_match", [0.0, 0.0, 1.0])
    exec(recipe, {"run": tmp_path})
    counted = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert counted == {"0.0": "2", "-1.0": "1"}
