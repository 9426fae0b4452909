"""The store of the record: MLflow's, opened by one recorder at a time.

The only module that imports mlflow.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.errors import QuantgateError, UsageError
from quantgate.recorded_span import Span

# A tag holds 5,000 characters.
MAX_TAG_CHARACTERS = 4900


class RecordError(QuantgateError):
    """The store cannot be reached; what was to be recorded stays on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Where the record is."""

    tracking_uri: str
    experiment: str
    experiment_id: str
    run_id: str
    variant_run_ids: Mapping[str, str]


class RecordStore:
    """An open store; `client` is mlflow's own."""

    def __init__(self, client: Any, *, uri: str, runs: Path) -> None:
        self.client = client
        self.uri = uri
        self._runs = runs

    def experiment(self, name: str) -> str:
        """The id of an experiment, made where there is none."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        runs = self._runs
        location = (
            (runs.resolve() / "artifacts").as_uri() if self.uri == embedded_uri(runs) else None
        )
        return str(self.client.create_experiment(name, artifact_location=location))

    def log(
        self,
        run_id: str,
        span: Span,
        *,
        params: Mapping[str, str],
        metrics: list[tuple[str, float, int]],
    ) -> None:
        """Parameters, and metrics by name, value and step, at the end of `span`.

        In one batch: fifty single calls to a SQLite store take 1.4 s.
        """
        from mlflow.entities import Metric, Param

        at_ms = span.start_ms if span.end_ms is None else span.end_ms
        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, at_ms, step) for name, value, step in metrics],
            params=[Param(name, value) for name, value in params.items()],
        )

    def log_golden_set(self, run_id: str, name: str, lock_sha256: str) -> None:
        """A golden set as an input of the run."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        # MLflow caps a dataset's digest at 36 characters, so the whole one is in the source's tags.
        source = CodeDatasetSource(tags={"golden_set": name, "lock_sha256": lock_sha256})
        dataset = MetaDataset(source, name=name, digest=lock_sha256[:32])
        tag = InputTag(key="mlflow.data.context", value="golden set")
        entity = DatasetInput(dataset=dataset._to_mlflow_entity(), tags=[tag])
        self.client.log_inputs(run_id, [entity])


@contextmanager
def open_store(runs: Path, tracking_uri: str | None) -> Iterator[RecordStore]:
    """The store at `tracking_uri`, the embedded one under `runs` if None; others wait meanwhile.

    Raises:
        UsageError: mlflow is not installed.
        RecordError: the store cannot be reached, now or by what is done with it.
    """
    uri = tracking_uri or embedded_uri(runs)
    mlflow = _import_mlflow()
    with _locked(runs):
        try:
            yield RecordStore(mlflow.MlflowClient(tracking_uri=uri), uri=uri, runs=runs)
        except mlflow.exceptions.MlflowException as error:
            raise RecordError(f"{uri}: {error}") from error


def embedded_uri(runs: Path) -> str:
    """The MLflow store that needs no server."""
    return f"sqlite:///{runs.resolve() / 'mlflow.db'}"


def machine_tags(machine: Mapping[str, Any]) -> dict[str, str]:
    """The machine, its packages and the commit, as `describe_machine` found them."""
    tags = {"machine.cpu": machine["cpu"], "machine.cores": machine["num_cores"]}
    if gpus := machine.get("gpus"):
        tags["machine.gpus"] = ", ".join(gpus)
    if commit := machine.get("commit"):
        tags["commit"] = f"{commit}{' (dirty)' if machine['is_dirty'] else ''}"
    packages = machine["packages"]
    return {k: str(v) for k, v in tags.items()} | {f"version.{p}": v for p, v in packages.items()}


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
