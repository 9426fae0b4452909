"""The record of a release: one MLflow parent run, and one child run per variant.

verdicts.json is on disk before this runs; recording again finds the runs of the same release and
returns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantgate.measurements_file import MeasurementSet, VariantMeasurements, read_measurements
from quantgate.record_store import (
    MAX_TAG_CHARACTERS,
    Recorded,
    RecordStore,
    machine_tags,
    open_store,
)
from quantgate.recorded_metrics import block_metrics, metrics_of
from quantgate.recorded_span import Span, span_of_release
from quantgate.release_folder import RECORDED, ReleaseFolder, releases
from quantgate.report.columns import columns_of_release, columns_of_seconds, columns_of_verdicts
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
_RELEASE_TAG = "quantgate.release"
_PARENT = "mlflow.parentRunId"


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
    with open_store(release.runs, tracking_uri) as store:
        recorded = _record(store, release, state, verdicts, measurements)
    release.update_state(
        stage=RECORDED,
        record={
            "tracking_uri": recorded.tracking_uri,
            "experiment_id": recorded.experiment_id,
            "run_id": recorded.run_id,
            # Judged again, they may be others, which nobody recorded.
            "verdicts_sha256": verdicts_sha256(verdicts),
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


def _record(
    store: RecordStore,
    release: ReleaseFolder,
    state: Mapping[str, Any],
    verdicts: ReleaseVerdicts,
    measurements: MeasurementSet,
) -> Recorded:
    client = store.client
    name = f"{state['source']['name']}/release-gates"
    experiment_id = store.experiment(name)
    digest = verdicts_sha256(verdicts)
    found = client.search_runs(
        [experiment_id],
        f"tags.`{_RELEASE_TAG}` = '{release.release_id}' and tags.`verdicts_sha256` = '{digest}'",
    )
    # The parent ends last, so one that has not ended lacks variants: it was cut short.
    whole = [r for r in found if _PARENT not in r.data.tags and r.info.status == "FINISHED"]
    if whole:
        parent = whole[0]
        children = {
            r.data.tags["variant"]: r.info.run_id
            for r in found
            if r.data.tags.get(_PARENT) == parent.info.run_id
        }
        return Recorded(
            tracking_uri=store.uri,
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
        **machine_tags(state["machine"]),
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
            "mlflow.note.content": summary[:MAX_TAG_CHARACTERS],
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
    store.log(parent_id, span, params=params, metrics=[
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
        store.log_golden_set(parent_id, golden_set, lock_sha256)
    for decision in verdicts.decisions:
        children[decision.variant] = _record_variant(
            store, experiment_id, parent_id, release, decision,
            measurements.variants.get(decision.variant), shared, params, span,
            is_champion=decision.variant == verdicts.champion,
        )  # fmt: skip
    # Last: a release cut short stays visibly unfinished, and is recorded again.
    client.set_terminated(parent_id, end_time=span.end_ms)
    return Recorded(
        tracking_uri=store.uri,
        experiment=name,
        experiment_id=experiment_id,
        run_id=parent_id,
        variant_run_ids=children,
    )


def _record_variant(
    store: RecordStore,
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
    client = store.client
    worst = min(decision.outcomes, key=lambda outcome: _GATE_VALUES[outcome])
    tags = {
        **shared,
        _PARENT: parent_id,
        "variant": decision.variant,
        "decision": "approved" if decision.approved else "not approved",
        "gate.verdict": str(worst),
        "mlflow.note.content": step_summary([decision], title=decision.variant)[
            :MAX_TAG_CHARACTERS
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
    store.log(run_id, span, params=params, metrics=metrics)
    client.log_table(run_id, columns_of_verdicts(decision), "gates.json")
    client.log_text(run_id, "\n".join(v.line() for v in decision.verdicts) + "\n", "verdicts.txt")
    folder = release.variant(decision.variant)
    if folder.is_dir():
        client.log_artifacts(run_id, str(folder), "items")
    client.set_terminated(run_id, end_time=span.end_ms)
    return run_id
