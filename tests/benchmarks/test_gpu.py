"""The GPU benchmark runs to its end on a toy without a GPU, and knows what it has not shown."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("gpu")


def test_the_toy_measures_every_arm_and_misses_the_aims_of_a_gpu(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    options = ["--schemes", "bf16,int4-gptq", "--concurrency", "3", "--json", str(path), "--check"]
    assert gpu.main(["--device", "cpu", "--tiny", *options]) == 1
    assert "MISSED MBU of BF16 at 8" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert len(report["rows"]) == 2 * 3
    for row in report["rows"]:
        assert row["reason"] is None
        assert row["tok_per_s"] > 0
        if row["arm"] == "ours":
            assert row["mbu"] > 0
            assert {"schedule", "model", "sample", "the rest"} <= row["breakdown_ms"].keys()
    assert report["kernels"]["int4-gptq"][0]["name"] == "quantgate GptqLinear 4 bit"
    assert report["ceilings"]["bytes_per_s"] > 0


def test_what_there_is_no_time_for_is_not_run_rather_than_0(gpu: Any, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--limit-s", "0", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["reason"] for row in rows} == {"no time was left"}
    assert all(row["tok_per_s"] is None for row in rows)


@pytest.mark.parametrize(
    ("mbu", "ours_at_32", "int4", "missed"),
    [
        (0.75, 500.0, 180.0, []),
        (0.749, 500.0, 180.0, ["MBU of BF16 at 1", "MBU of BF16 at 8"]),
        (0.75, 499.0, 180.0, ["BF16 over transformers' continuous batching at 32"]),
        (0.75, 500.0, 179.0, ["INT4 over BF16 at 1"]),
        (0.75, 500.0, None, ["INT4 over BF16 at 1"]),
    ],
)
def test_an_aim_is_reached_at_its_value_and_missed_below_or_unmeasured(
    gpu: Any, mbu: float, ours_at_32: float, int4: float | None, missed: list[str]
) -> None:
    rows = [
        gpu.Row("bf16", 1, gpu.OWN, tok_per_s=100.0, mbu=mbu),
        gpu.Row("bf16", 8, gpu.OWN, tok_per_s=700.0, mbu=mbu),
        gpu.Row("bf16", 32, gpu.OWN, tok_per_s=ours_at_32, mbu=0.5),
        gpu.Row("bf16", 32, gpu.CONTINUOUS, tok_per_s=100.0),
        gpu.Row("int4-nf4", 1, gpu.OWN, tok_per_s=int4),
    ]
    found = [line.partition(":")[0] for line in gpu.find_missed(rows, is_8b=True)]
    assert found == missed
