"""Each benchmark explains itself, writes what it measured, and names what it missed."""

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# The rest is what these import, or start and give their work on standard input.
SCRIPTS = sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
)
Script = Callable[[str], Any]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A benchmark as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def run(main: Callable[[], int | None]) -> int | str | None:
    """What `main` would end the process with: a code, or a message, which is code 1."""
    try:
        return main() or 0
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_explains_itself(
    name: str,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    assert run(script(name).main) == 0
    shown = capsys.readouterr().out
    assert "usage:" in shown
    summary = (script(name).__doc__ or "").splitlines()[0].split(":")[0]
    assert summary in " ".join(shown.split())


def test_the_host_s_part_is_timed_at_every_size(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "host_part.json"
    module = script("host_part")
    assert module.main(["--steps", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["running"] for row in rows] == list(module.SIZES)
    assert all(row["us_whole"] > 0 and row["us_streamed"] > 0 for row in rows)


def test_the_scheduler_is_timed_at_every_size(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "scheduler.json"
    module = script("scheduler")
    assert module.main(["--seconds", "0.002", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["running"] for row in rows] == list(module.SIZES)
    assert all(row["us_1000_queued_100_tenants"] > 0 for row in rows)


def test_windows_replay_the_same_bursts(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "window.json"
    module = script("window")
    monkeypatch.setattr(module, "WINDOWS_MS", (0.0, 5.0))
    assert module.main(["--seconds", "0.2", "--rounds", "1", "--json", str(path)]) == 0
    runs = json.loads(path.read_text())["runs"]
    assert set(runs) == {"0.0", "5.0"}
    counts = [found["num_requests"] for (found,) in runs.values()]
    assert counts[0] == counts[1] > 0


def test_counting_is_compared_with_a_step(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("observation")
    for name, value in {"BATCH": 4, "PROMPT": 8, "STEPS": 6, "REPEATS": 2}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", ["observation.py"])
    module.main()
    assert "of the step" in capsys.readouterr().out


def test_decode_steps_of_each_model_are_timed_at_each_batch(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("quantized_decode")
    monkeypatch.setattr(module.logging, "disable", lambda *_: None)
    monkeypatch.setattr(module.torch, "set_num_threads", lambda *_: None)
    model = script("window")._MODEL
    module.main([f"demo={model}", "--rounds", "1", "--batches", "1", "3"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "| batch | 1 | 3 |"
    # There is no second way for plain weights.
    assert [line.split(" |")[0] for line in shown[2:]] == ["| demo"]


@pytest.fixture
def serving(script: Script) -> Any:
    return script("serving")


def figures_of(serving: Any, *, ours: float, http: float) -> dict[str, Any]:
    """Both workloads, run once by every arm: `ours` and `http` tokens per second, others' 100."""
    request = serving.BenchRequest([2, 3], 10)
    speeds = {serving.STATIC: 100, serving.CONTINUOUS: 100, serving.FLOOR: 100}
    speeds |= {serving.OWN: ours, serving.HTTP: http, serving.STREAM: http, serving.ONE: 50}
    figures = {}
    for name in ("A", "B"):
        runs = {arm: [serving.ArmResult(int(speed * 10), 10.0)] for arm, speed in speeds.items()}
        figures[name] = serving.Figures([request], runs=runs)
    return figures


@pytest.mark.parametrize(
    ("ours", "http", "overhead_ms", "missed"),
    [
        (500.0, 450.0, 3.0, []),
        (499.0, 450.0, 3.0, ["workload B: our engine / static batches of 16 is 4.99"]),
        (500.0, 449.0, 3.0, ["workload A: our HTTP", "workload B: our HTTP"]),
        (500.0, 450.0, 3.1, ["HTTP adds 3.1 ms"]),
        (500.0, 450.0, float("nan"), ["HTTP adds nan ms"]),
    ],
)
def test_a_figure_of_serving_is_reached_at_its_value_and_named_when_missed(
    serving: Any, ours: float, http: float, overhead_ms: float, missed: list[str]
) -> None:
    idle = {"overhead_ms": overhead_ms, "target_ms": 3.0}
    found = serving._missed(figures_of(serving, ours=ours, http=http), idle)
    assert len(found) == len(missed)
    assert all(line.startswith(begin) for line, begin in zip(found, missed, strict=True))


@pytest.mark.parametrize("checks", [True, False])
def test_serving_ends_with_1_where_a_figure_is_missed_and_was_asked_for(
    checks: bool,
    serving: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serving, "run_speed", lambda *_, **__: ({"quick": True}, ["workload A: …"]))
    # It silences what other tests listen to.
    for owner, name in (
        (serving.logging, "disable"),
        (serving.warnings, "simplefilter"),
        (serving.transformers.utils.logging, "set_verbosity_error"),
        (serving.transformers.utils.logging, "disable_progress_bar"),
    ):
        monkeypatch.setattr(owner, name, lambda *_: None)
    path = tmp_path / "serving.json"
    options = ["--quick", "--json", str(path), *(["--check"] if checks else [])]
    assert serving.main(options) == int(checks)
    assert "MISSED workload A: …" in capsys.readouterr().out
    assert json.loads(path.read_text())["missed"] == ["workload A: …"]


# What overload.py reports of a flood that everything withstood.
_CLASS = {
    "answers": {"200": 9, "429": 90, "504": 1},
    "sent": 100,
    "admitted": 10,
    "without_retry_after": 0,
    "queue_wait_ms": {"p95": 400.0},
}
_WITHSTOOD: dict[str, Any] = {
    "classes": dict.fromkeys(("interactive", "normal", "bulk"), _CLASS),
    "sent": 300,
    "server_counts": {"request_success_total": 30, "admission_rejections_total": 270},
    "deadline_ms": 400,
    "factor": 10.0,
    "capacity_requests_per_s": 10.0,
    "offered_requests_per_s": 95.0,
}


def test_a_flood_that_was_withstood_misses_nothing(script: Script) -> None:
    assert script("overload")._missed(_WITHSTOOD) == []


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (("offered_requests_per_s",), 94.9, "could not send as fast"),
        (("sent",), 301, "the server counts"),
        (("classes", "interactive", "queue_wait_ms", "p95"), 400.1, "interactive queue wait"),
        (("classes", "interactive", "queue_wait_ms"), None, "interactive queue wait None"),
        (("classes", "interactive", "answers", "200"), 8, "answers"),
        (("classes", "bulk", "without_retry_after"), 1, "bulk: 1 times 429 without Retry-After"),
        (("classes", "normal", "answers", "500"), 1, "normal: answers"),
    ],
)
def test_what_a_flood_broke_is_named(
    where: tuple[str, ...], value: Any, named: str, script: Script
) -> None:
    report = copy.deepcopy(_WITHSTOOD)
    place = report
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    assert any(named in line for line in script("overload")._missed(report))


@pytest.mark.parametrize(("mb_per_s", "code"), [(150.0, 0), (149.0, 1)])
def test_an_audit_that_is_too_slow_is_named(
    mb_per_s: float,
    code: int,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = script("quality")
    row = {"scheme": "int4-nf4", "mb_per_s_per_core": mb_per_s, "seconds": 2.0, "peak_bytes": 1}
    monkeypatch.setattr(module, "measure_audit", lambda *_, **__: [row])
    path = tmp_path / "quality.json"
    monkeypatch.setattr(sys, "argv", ["quality.py", "audit", "--check", "--json", str(path)])
    ended = run(module.main)
    assert ended == 0 if code == 0 else "int4-nf4 149 MB/s" in str(ended)
    assert json.loads(path.read_text())["audit"] == [row]


@pytest.mark.parametrize(("observed", "code"), [(0.05, 0), (0.5, 1)])
def test_a_statistic_that_errs_too_often_is_named(
    observed: float,
    code: int,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = script("quality_statistics")
    figure = module.Figure(
        statistic="coin", situation="fair", kind="error", claimed=0.05, observed=observed,
        replicates=2000,
    )  # fmt: skip
    monkeypatch.setattr(module, "simulate", lambda _: [figure])
    path = tmp_path / "statistics.json"
    monkeypatch.setattr(sys, "argv", ["quality_statistics.py", "--check", "--json", str(path)])
    assert run(module.main) == code
    assert ("misses: coin, fair" in capsys.readouterr().err) == bool(code)
    assert json.loads(path.read_text())["figures"][0]["holds"] is (code == 0)


def test_the_client_that_others_start_needs_work_on_standard_input() -> None:
    found = subprocess.run(
        [sys.executable, str(FOLDER / "serving_client.py")],
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode != 0
    assert "JSONDecodeError" in found.stderr
