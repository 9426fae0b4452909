"""The record of a drill: one MLflow run with its score, its false alarms and its table."""

from __future__ import annotations

from pathlib import Path

from quantgate.drill.results import DrillResult
from quantgate.record_store import (
    MAX_TAG_CHARACTERS,
    Recorded,
    RecordStore,
    machine_tags,
    open_store,
)
from quantgate.recorded_span import span_of_drill
from quantgate.report.drill import drill_markdown


def record_drill(path: Path, result: DrillResult, *, tracking_uri: str | None = None) -> Recorded:
    """Records a drill.

    Args:
        path: drill.json, in its folder under the runs.
        tracking_uri: an MLflow server or database; None for the embedded store under the runs.

    Raises:
        UsageError: mlflow is not installed.
        RecordError: the store cannot be reached.
    """
    with open_store(path.parents[1], tracking_uri) as store:
        return _record(store, path, result)


def _record(store: RecordStore, path: Path, result: DrillResult) -> Recorded:
    client = store.client
    name = f"{result.source}/gate-drills"
    experiment_id = store.experiment(name)
    table = drill_markdown(result)
    tags = {
        "policy": result.policy,
        "policy_sha256": result.policy_sha256,
        "source_sha256": result.source_sha256,
        "drill": "clean" if result.is_clean else "not clean",
        "mlflow.note.content": table[:MAX_TAG_CHARACTERS],
        **machine_tags(result.machine),
    }
    span = span_of_drill(result)
    run_id: str = client.create_run(
        experiment_id, start_time=span.start_ms, run_name=path.parent.name, tags=tags
    ).info.run_id
    metrics = {
        "drill/harmful.count": result.num_harmful,
        "drill/caught.count": result.num_caught,
        "drill/benign.count": result.num_benign,
        "drill/blocked.count": result.num_blocked,
        "drill/not_judged.count": result.num_not_judged,
        "drill/duration_s": result.seconds,
    }
    # Of no fault at all there is no score, and it is not 0.
    if result.num_harmful:
        metrics["drill/mutation_score.rate"] = result.num_caught / result.num_harmful
    if result.num_benign:
        metrics["drill/false_alarm.rate"] = result.num_blocked / result.num_benign
    metrics |= {f"drill/{layer}_s": took for layer, took in result.seconds_by_layer.items()}
    store.log(
        run_id,
        span,
        params={"model": result.source},
        metrics=[(key, float(value), 0) for key, value in metrics.items()],
    )
    client.log_artifact(run_id, str(path))
    client.log_text(run_id, table, "drill.md")
    client.set_terminated(run_id, end_time=span.end_ms)
    return Recorded(
        tracking_uri=store.uri,
        experiment=name,
        experiment_id=experiment_id,
        run_id=run_id,
        variant_run_ids={},
    )
