"""A drill in a real SQLite MLflow store."""

from __future__ import annotations

from pathlib import Path

import mlflow

from quantgate.drill.results import Caught, DrillResult, DrillRow, write_drill
from quantgate.machine import describe_machine
from quantgate.record_drill import record_drill


def test_a_drill_is_one_run_with_its_score_and_its_table(tmp_path: Path) -> None:
    rows = tuple(
        DrillRow(
            fault=fault, what="w", variant="bf16", is_harmful=outcome is not Caught.PASSED,
            outcome=outcome, layer="", gates=(), verdict="", effect="", seconds=1.0,
        )
        for fault, outcome in (
            ("one", Caught.CAUGHT), ("two", Caught.LET_THROUGH), ("same", Caught.PASSED)
        )
    )  # fmt: skip
    result = DrillResult(
        policy="p", policy_sha256="0", source="order-desk", source_sha256="1",
        machine=describe_machine(), taken_at="2026-11-24T10:00:00+00:00", seconds=9.0,
        seconds_by_layer={"audit": 5.0}, rows=rows, blind_gates={}, not_applicable={}, advice={},
    )  # fmt: skip
    path = tmp_path / "drill-p-1" / "drill.json"
    write_drill(path, result)
    recorded = record_drill(path, result)
    run = mlflow.MlflowClient(tracking_uri=recorded.tracking_uri).get_run(recorded.run_id)
    assert recorded.experiment == "order-desk/gate-drills"
    assert run.data.metrics["drill/mutation_score.rate"] == 0.5
    assert run.data.metrics["drill/false_alarm.rate"] == 0.0
    assert run.data.metrics["drill/audit_s"] == 5.0
    assert run.data.tags["drill"] == "not clean"
    assert run.info.status == "FINISHED"
    assert (run.info.start_time, run.info.end_time) == (1795514400000, 1795514409000)
    artifacts = tmp_path / "artifacts" / recorded.run_id / "artifacts"
    assert (artifacts / "drill.json").read_bytes() == path.read_bytes()
    assert "| `two` |" in (artifacts / "drill.md").read_text(encoding="utf-8")
