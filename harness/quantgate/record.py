"""The record: one MLflow parent run per release, one child run per variant; one run per drill.

The only module that imports mlflow. verdicts.json is on disk before this runs; recording again
finds the runs of the same release and returns them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.drill.results import DrillResult
from quantgate.errors import QuantgateError, UsageError
from quantgate.measurements_file import MeasurementSet, VariantMeasurements, read_measurements
from quantgate.recorded_metrics import block_metrics, metrics_of
from quantgate.recorded_span import Span, span_of_drill, span_of_release
from quantgate.release_folder import RECORDED, ReleaseFolder, releases
from quantgate.report.columns import columns_of_release, columns_of_seconds, columns_of_verdicts
from quantgate.report.drill import drill_markdown
from quantgate.report.summary import step_summary
from quantgate.verdict import Decision, Outcome
from quantgate.verdicts_file import ReleaseVerdicts, read_verdicts, verdicts_sha256

# Sortable in the UI: a worse outcome is a smaller number.
_GATE_VALUES = {
    Outcome.PASS: 1.0,
    Outcome.INCONCLUSIVE: 0.5,
    Outcome.FAIL: 0.0,
    Outcome.INVALID: -1.0,
}
_MAX_TAG_CHARACTERS = 4900
_RELEASE_TAG = "quantgate.release"


class RecordError(QuantgateError):
    """The release could not be recorded; its verdicts stay on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Where the record is."""

    tracking_uri: str
    experiment: str
    experiment_id: str
    run_id: str
    variant_run_ids: Mapping[str, str]


def embedded_uri(runs: Path) -> str:
    """The MLflow store that needs no server."""
    return f"sqlite:///{runs.resolve() / 'mlflow.db'}"


def record_release(release: ReleaseFolder, *, tracking_uri: str | None = None) -> Recorded:
    """Records a judged release.

    Args:
        tracking_uri: an MLflow server or database; None for the embedded store under runs/.

    Raises:
        UsageError: mlflow is not installed, or the release is not judged.
        RecordError: the store cannot be reached.
    """
    verdicts = read_verdicts(release.verdicts)
    measurements = read_measurements(release.measurements)
    state = release.read_state()
    uri = tracking_uri or embedded_uri(release.runs)
    mlflow = _import_mlflow()
    with _locked(release.runs):
        try:
            recorded = _record(mlflow, uri, release, state, verdicts, measurements)
        except mlflow.exceptions.MlflowException as error:
            raise RecordError(f"{uri}: {error}") from error
    release.update_state(
        stage=RECORDED,
        record={
            "tracking_uri": recorded.tracking_uri,
            "experiment_id": recorded.experiment_id,
            "run_id": recorded.run_id,
        },
    )
    return recorded


def ui_page(runs: Path) -> str:
    """The page of the MLflow UI that lists the runs of the newest recorded release's experiment.

    Without `workflowType` the UI opens on traces, of which a release has none.
    """
    # Releases that earlier versions recorded do not say their experiment.
    ids = (
        release.read_state().get("record", {}).get("experiment_id") for release in releases(runs)
    )
    experiment_id = next(filter(None, ids), None)
    place = f"experiments/{experiment_id}/runs" if experiment_id else "experiments"
    return f"#/{place}?workflowType=machine_learning"


def _import_mlflow() -> Any:
    # Read when mlflow is imported: without it, usage data is sent over the network.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
    except ImportError as error:
        raise UsageError(
            "recording needs mlflow, which is not installed. Write: pip install 'quantgate[record]'"
        ) from error
    return mlflow


@contextmanager
def _locked(runs: Path) -> Iterator[None]:
    """One recorder at a time: concurrent first opens of a SQLite store break it for good."""
    with (runs / ".mlflow.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _record(
    mlflow: Any,
    uri: str,
    release: ReleaseFolder,
    state: Mapping[str, Any],
    verdicts: ReleaseVerdicts,
    measurements: MeasurementSet,
) -> Recorded:
    client = mlflow.MlflowClient(tracking_uri=uri)
    name = f"{state['source']['name']}/release-gates"
    experiment_id = _experiment(client, name, uri=uri, runs=release.runs)
    digest = verdicts_sha256(verdicts)
    found = client.search_runs(
        [experiment_id],
        f"tags.`{_RELEASE_TAG}` = '{release.release_id}' and tags.`verdicts_sha256` = '{digest}'",
    )
    if found:
        parent = next(r for r in found if "mlflow.parentRunId" not in r.data.tags)
        children = {
            r.data.tags["variant"]: r.info.run_id for r in found if "variant" in r.data.tags
        }
        return Recorded(
            tracking_uri=uri,
            experiment=name,
            experiment_id=experiment_id,
            run_id=parent.info.run_id,
            variant_run_ids=children,
        )
    children = {}
    span = span_of_release(state)
    shared = {
        _RELEASE_TAG: release.release_id,
        "policy": verdicts.policy,
        "policy_sha256": verdicts.policy_sha256,
        "verdicts_sha256": digest,
        "source_sha256": state["source"]["sha256"],
        "server_options": " ".join(state["server_options"]),
        **_machine_tags(state["machine"]),
    }
    approved = [d.variant for d in verdicts.decisions if d.approved]
    summary = step_summary(verdicts.decisions, title=release.release_id)
    parent = client.create_run(
        experiment_id,
        start_time=span.start_ms,
        run_name=release.release_id,
        tags=shared
        | {
            "approved": ", ".join(approved) or "none",
            "champion": verdicts.champion,
            "reference": verdicts.reference,
            "mlflow.note.content": summary[:_MAX_TAG_CHARACTERS],
        },
    )
    parent_id = parent.info.run_id
    # Parameters, since they alone stand beside each other when runs are compared.
    params = {
        "release": release.release_id,
        "policy": verdicts.policy,
        "model": state["source"]["name"],
        "device": state["identity"]["device"],
        "reference": verdicts.reference,
        "champion": verdicts.champion,
    }
    _log(client, parent_id, span, params=params, metrics=[
        ("release/approved_count", float(len(approved)), 0),
        ("release/variant_count", float(len(verdicts.decisions)), 0),
    ])  # fmt: skip
    for path in (release.policy, release.measurements, release.verdicts):
        client.log_artifact(parent_id, str(path))
    client.log_text(parent_id, summary, "summary.md")
    client.log_table(parent_id, columns_of_release(verdicts.decisions), "gates-of-variants.json")
    if seconds := state.get("quality_seconds"):
        client.log_table(parent_id, columns_of_seconds(seconds), "quality-seconds.json")
    for golden_set, lock_sha256 in state["golden_sets"].items():
        _log_golden_set(client, parent_id, golden_set, lock_sha256)
    for decision in verdicts.decisions:
        children[decision.variant] = _record_variant(
            client, experiment_id, parent_id, release, decision,
            measurements.variants.get(decision.variant), shared, params, span,
            is_champion=decision.variant == verdicts.champion,
        )  # fmt: skip
    # The parent ends last: a release cut short stays visibly unfinished, and is recorded again.
    client.set_terminated(parent_id, end_time=span.end_ms)
    return Recorded(
        tracking_uri=uri,
        experiment=name,
        experiment_id=experiment_id,
        run_id=parent_id,
        variant_run_ids=children,
    )


def record_drill(path: Path, result: DrillResult, *, tracking_uri: str | None = None) -> Recorded:
    """Records a drill: one run with its score, its false alarms and its table.

    Args:
        path: drill.json, in its folder under the runs.
        tracking_uri: as in `record_release`.

    Raises:
        UsageError: mlflow is not installed.
        RecordError: the store cannot be reached.
    """
    runs = path.parents[1]
    uri = tracking_uri or embedded_uri(runs)
    mlflow = _import_mlflow()
    with _locked(runs):
        try:
            return _record_drill(mlflow, uri, runs, path, result)
        except mlflow.exceptions.MlflowException as error:
            raise RecordError(f"{uri}: {error}") from error


def _record_drill(mlflow: Any, uri: str, runs: Path, path: Path, result: DrillResult) -> Recorded:
    client = mlflow.MlflowClient(tracking_uri=uri)
    name = f"{result.source}/gate-drills"
    experiment_id = _experiment(client, name, uri=uri, runs=runs)
    table = drill_markdown(result)
    tags = {
        "policy": result.policy,
        "policy_sha256": result.policy_sha256,
        "source_sha256": result.source_sha256,
        "drill": "clean" if result.is_clean else "not clean",
        "mlflow.note.content": table[:_MAX_TAG_CHARACTERS],
        **_machine_tags(result.machine),
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
    _log(client, run_id, span, params={"model": result.source},
         metrics=[(key, float(value), 0) for key, value in metrics.items()])  # fmt: skip
    client.log_artifact(run_id, str(path))
    client.log_text(run_id, table, "drill.md")
    client.set_terminated(run_id, end_time=span.end_ms)
    return Recorded(
        tracking_uri=uri,
        experiment=name,
        experiment_id=experiment_id,
        run_id=run_id,
        variant_run_ids={},
    )


def _experiment(client: Any, name: str, *, uri: str, runs: Path) -> str:
    """The id of an experiment, made where there is none."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = (runs.resolve() / "artifacts").as_uri() if uri == embedded_uri(runs) else None
    return str(client.create_experiment(name, artifact_location=location))


def _record_variant(
    client: Any,
    experiment_id: str,
    parent_id: str,
    release: ReleaseFolder,
    decision: Decision,
    measured: VariantMeasurements | None,
    shared: Mapping[str, str],
    release_params: Mapping[str, str],
    span: Span,
    *,
    is_champion: bool,
) -> str:
    worst = min(decision.outcomes, key=lambda outcome: _GATE_VALUES[outcome])
    tags = {
        **shared,
        "mlflow.parentRunId": parent_id,
        "variant": decision.variant,
        "decision": "approved" if decision.approved else "not approved",
        "gate.verdict": str(worst),
        "mlflow.note.content": step_summary([decision], title=decision.variant)[
            :_MAX_TAG_CHARACTERS
        ],
    }
    tags |= {f"gate.{verdict.gate_id}": str(verdict.outcome) for verdict in decision.verdicts}
    params = {**release_params, "variant": decision.variant}
    if measured is not None:
        tags["artifact_sha256"] = measured.artifact_sha256
        params |= {"scheme": measured.scheme, "artifact": measured.artifact_sha256[:12]}
    run = client.create_run(
        experiment_id,
        start_time=span.start_ms,
        run_name=f"{decision.variant} {release.release_id}",
        tags=tags,
    )
    run_id: str = run.info.run_id
    metrics = [
        (f"gate/{verdict.gate_id}", _GATE_VALUES[verdict.outcome], 0)
        for verdict in decision.verdicts
    ]
    metrics += [
        (
            "gate/failed_count",
            float(sum(v.outcome is not Outcome.PASS for v in decision.verdicts)),
            0,
        )
    ]
    if measured is not None:
        for measurement in measured.measurements.values():
            metrics += [(name, value, 0) for name, value in metrics_of(measurement)]
    metrics += block_metrics(release, decision.variant, is_champion=is_champion)
    _log(client, run_id, span, params=params, metrics=metrics)
    client.log_table(run_id, columns_of_verdicts(decision), "gates.json")
    client.log_text(run_id, "\n".join(v.line() for v in decision.verdicts) + "\n", "verdicts.txt")
    folder = release.variant(decision.variant)
    if folder.is_dir():
        client.log_artifacts(run_id, str(folder), "items")
    client.set_terminated(run_id, end_time=span.end_ms)
    return run_id


def _machine_tags(machine: Mapping[str, Any]) -> dict[str, str]:
    tags = {"machine.cpu": machine["cpu"], "machine.cores": machine["num_cores"]}
    if gpus := machine.get("gpus"):
        tags["machine.gpus"] = ", ".join(gpus)
    if commit := machine.get("commit"):
        tags["commit"] = f"{commit}{' (dirty)' if machine['is_dirty'] else ''}"
    packages = machine["packages"]
    return {k: str(v) for k, v in tags.items()} | {f"version.{p}": v for p, v in packages.items()}


def _log(
    client: Any,
    run_id: str,
    span: Span,
    *,
    params: Mapping[str, str],
    metrics: list[tuple[str, float, int]],
) -> None:
    """One batch: fifty single calls to a SQLite store take 1.4 s."""
    from mlflow.entities import Metric, Param

    at_ms = span.start_ms if span.end_ms is None else span.end_ms
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, at_ms, step) for name, value, step in metrics],
        params=[Param(name, value) for name, value in params.items()],
    )


def _log_golden_set(client: Any, run_id: str, name: str, lock_sha256: str) -> None:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    # MLflow caps a dataset's digest at 36 characters, so the whole one is in the source's tags.
    source = CodeDatasetSource(tags={"golden_set": name, "lock_sha256": lock_sha256})
    dataset = MetaDataset(source, name=name, digest=lock_sha256[:32])
    tag = InputTag(key="mlflow.data.context", value="golden set")
    client.log_inputs(run_id, [DatasetInput(dataset=dataset._to_mlflow_entity(), tags=[tag])])
