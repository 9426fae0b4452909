"""The store of the record says where it is, or why it is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from quantgate.errors import UsageError
from quantgate.record_store import RecordError, embedded_uri, open_store


def test_the_embedded_store_lies_under_the_runs_and_an_experiment_is_made_once(
    tmp_path: Path,
) -> None:
    with open_store(tmp_path, None) as store:
        assert store.uri == embedded_uri(tmp_path)
        first = store.experiment("a/release-gates")
        assert store.experiment("a/release-gates") == first
        location = store.client.get_experiment(first).artifact_location
    assert location == (tmp_path / "artifacts").as_uri()


def test_what_the_store_refuses_is_an_error_that_names_it(tmp_path: Path) -> None:
    with (
        pytest.raises(RecordError, match=r"sqlite:///.*mlflow\.db: the disk is full"),
        open_store(tmp_path, None),
    ):
        raise MlflowException("the disk is full")


def test_without_mlflow_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with (
        pytest.raises(UsageError, match=r"pip install 'quantgate\[record\]'"),
        open_store(tmp_path, None),
    ):
        pytest.fail("opened")
