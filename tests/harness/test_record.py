"""The record in a real SQLite MLflow store."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import mlflow
import pytest

from quantgate.record import record_release, ui_page
from quantgate.record_store import embedded_uri
from quantgate.recorded_span import span_of_release
from quantgate.release import ReleaseResult
from quantgate.release_folder import JUDGED, RECORDED, releases

if TYPE_CHECKING:
    from conftest import MiniProject


@pytest.fixture(scope="module")
def runs(mini_release: ReleaseResult) -> dict[str, Any]:
    """The recorded runs by variant; the parent under its release id."""
    uri = embedded_uri(mini_release.folder.runs)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("order-desk/release-gates")
    found = client.search_runs([experiment.experiment_id])
    return {r.data.tags.get("variant", r.data.tags["quantgate.release"]): r for r in found}


def test_a_release_is_one_parent_with_one_child_per_variant(
    runs: dict[str, Any], mini_release: ReleaseResult
) -> None:
    parent = runs[mini_release.folder.release_id]
    assert runs.keys() == {mini_release.folder.release_id, "bf16", "int4-nf4"}
    for variant in ("bf16", "int4-nf4"):
        assert runs[variant].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_run_stands_at_the_time_of_the_measurement_and_not_of_its_recording(
    release_copy: MiniProject,
) -> None:
    release = next(releases(release_copy.runs))
    (release_copy.runs / "mlflow.db").unlink()
    # Recorded anew, months after it was measured.
    release.update_state(
        started_at="2026-01-02T03:04:05+00:00", measured_at="2026-01-02T03:14:05+00:00"
    )
    recorded = record_release(release)
    client = mlflow.MlflowClient(tracking_uri=recorded.tracking_uri)
    for run_id in (recorded.run_id, *recorded.variant_run_ids.values()):
        info = client.get_run(run_id).info
        assert info.start_time == 1767323045000
        assert info.end_time - info.start_time == 600_000
    [peak] = client.get_metric_history(recorded.variant_run_ids["bf16"], "memory/peak_bytes.max")
    assert peak.timestamp == 1767323645000


def test_an_earlier_release_that_does_not_say_when_it_ended_ends_when_it_is_recorded() -> None:
    assert span_of_release({"started_at": "2026-01-02T03:04:05+00:00"}).end_ms is None


def test_how_the_servers_were_started_is_recorded(runs: dict[str, Any]) -> None:
    options = {run.data.tags["server_options"] for run in runs.values()}
    assert len(options) == 1
    assert "--no-prefix-cache --no-coalescing --response-cache-mib 0" in options.pop()


def test_verdicts_are_tags_that_can_be_searched(
    runs: dict[str, Any], mini_release: ReleaseResult
) -> None:
    client = mlflow.MlflowClient(tracking_uri=embedded_uri(mini_release.folder.runs))
    experiment_id = runs["bf16"].info.experiment_id
    failed = client.search_runs([experiment_id], "tags.`gate.kl` = 'FAIL'")
    assert [run.data.tags["variant"] for run in failed] == ["int4-nf4"]
    assert runs["int4-nf4"].data.tags["decision"] == "not approved"
    assert runs["bf16"].data.tags["gate.verdict"] == "PASS"


def test_metrics_stand_in_sections_and_blocks_are_steps(
    runs: dict[str, Any], mini_release: ReleaseResult
) -> None:
    metrics = runs["int4-nf4"].data.metrics
    sections = {name.split("/")[0] for name in metrics}
    assert {"quality", "perf", "memory", "stability", "gate", "blocks"} <= sections
    assert metrics["gate/kl"] == 0.0
    client = mlflow.MlflowClient(tracking_uri=embedded_uri(mini_release.folder.runs))
    history = client.get_metric_history(runs["int4-nf4"].info.run_id, "blocks/output_tok_per_s")
    assert [point.step for point in history] == [0, 1, 2, 3]


def test_files_are_artifacts_under_the_runs_folder(
    runs: dict[str, Any], mini_release: ReleaseResult
) -> None:
    folder = mini_release.folder
    parent = runs[folder.release_id]
    artifacts = folder.runs / "artifacts" / parent.info.run_id / "artifacts"
    for name in ("policy.yaml", "measurements.json", "verdicts.json", "summary.md"):
        assert (artifacts / name).is_file()
    assert (artifacts / "verdicts.json").read_bytes() == folder.verdicts.read_bytes()


def test_what_a_release_was_stands_beside_every_variant_when_runs_are_compared(
    runs: dict[str, Any], mini_release: ReleaseResult
) -> None:
    release = {
        "release": mini_release.folder.release_id,
        "policy": "mini.cpu",
        "model": "order-desk",
        "device": "cpu",
        "reference": "source",
        "champion": "bf16",
    }
    assert runs[mini_release.folder.release_id].data.params == release
    params = runs["int4-nf4"].data.params
    assert params.pop("artifact")
    assert params == release | {"variant": "int4-nf4", "scheme": "int4-nf4"}


def test_the_release_has_tables_of_all_verdicts_and_seconds_and_a_variant_one_of_its_own(
    runs: dict[str, Any], mini_release: ReleaseResult
) -> None:
    folder = mini_release.folder

    def table(run: str, name: str) -> tuple[list[str], list[list[Any]]]:
        artifacts = folder.runs / "artifacts" / runs[run].info.run_id / "artifacts"
        found = json.loads((artifacts / name).read_text(encoding="utf-8"))
        return found["columns"], found["data"]

    # The UI groups rows by the first column and shows the second of each run.
    columns, rows = table("int4-nf4", "gates.json")
    assert columns[:2] == ["gate", "verdict"]
    assert ["kl", "FAIL"] in [row[:2] for row in rows]
    columns, all_rows = table(folder.release_id, "gates-of-variants.json")
    assert columns[:2] == ["gate", "verdict"]
    assert ["int4-nf4 kl", "FAIL"] in [row[:2] for row in all_rows]
    assert {row[columns.index("variant")] for row in all_rows} == {"bf16", "int4-nf4"}
    columns, seconds = table(folder.release_id, "quality-seconds.json")
    assert columns == ["part", "seconds"]
    assert {"source order-total", "bf16 served"} <= {part for part, _ in seconds}


def test_the_ui_opens_on_the_runs_of_the_newest_release_and_not_on_traces(
    runs: dict[str, Any], release_copy: MiniProject
) -> None:
    experiment_id = runs["bf16"].info.experiment_id
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    assert ui_page(release_copy.runs) == page
    # As an earlier version recorded it.
    for release in releases(release_copy.runs):
        release.update_state(record={"run_id": "r"})
    assert ui_page(release_copy.runs) == "#/experiments?workflowType=machine_learning"


def test_golden_sets_are_inputs_with_the_digest_of_their_lock(
    runs: dict[str, Any], mini_release: ReleaseResult
) -> None:
    inputs = runs[mini_release.folder.release_id].inputs.dataset_inputs
    locks = mini_release.folder.read_state()["golden_sets"]
    assert {i.dataset.name: i.dataset.digest for i in inputs} == {
        name: digest[:32] for name, digest in locks.items()
    }


def test_recording_twice_finds_the_first_record(release_copy: MiniProject) -> None:
    release = next(releases(release_copy.runs))
    first = record_release(release)
    assert record_release(release) == first


def test_a_record_cut_short_is_made_again_with_every_variant(release_copy: MiniProject) -> None:
    release = next(releases(release_copy.runs))
    whole = record_release(release)
    client = mlflow.MlflowClient(tracking_uri=whole.tracking_uri)
    client.delete_run(whole.variant_run_ids["int4-nf4"])
    client.update_run(whole.run_id, status="RUNNING")
    again = record_release(release)
    assert again.run_id != whole.run_id
    assert again.variant_run_ids.keys() == {"bf16", "int4-nf4"}
    for run_id in again.variant_run_ids.values():
        assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == again.run_id
    assert record_release(release) == again


def test_recording_is_what_lets_a_release_be_promoted(release_copy: MiniProject) -> None:
    release = next(releases(release_copy.runs))
    release.update_state(stage=JUDGED)
    record_release(release)
    assert release.read_state()["stage"] == RECORDED


def test_importing_the_recorder_does_not_import_mlflow() -> None:
    code = "import sys, quantgate.record; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
