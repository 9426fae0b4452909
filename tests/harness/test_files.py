"""Files are whole or not there, and never hold what is not a number."""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from quantgate import errors
from quantgate.files import (
    canonical_json,
    read_json,
    sha256_of_bytes,
    sha256_of_file,
    sha256_of_files,
    write_bytes,
    write_json,
)


def test_a_file_is_written_with_its_folder_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"b": "é", "a": [1]})
    assert read_json(path) == {"b": "é", "a": [1]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_cut_short_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(type(error)):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_refused_and_the_old_file_stays(
    tmp_path: Path, value: float
) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"deep": [value]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)
    assert read_json(path) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_equal_values_have_one_canonical_form() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()


def test_a_file_larger_than_a_chunk_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4097
    (tmp_path / "big").write_bytes(data)
    assert sha256_of_file(tmp_path / "big") == sha256_of_bytes(data)


def test_the_digest_of_a_folder_is_of_names_and_bytes_in_any_order() -> None:
    digest = sha256_of_files({"a": "1", "b": "2"})
    assert sha256_of_files({"b": "2", "a": "1"}) == digest
    assert sha256_of_files({"a": "2", "b": "1"}) != digest


def test_the_tree_in_the_docstring_of_errors_is_the_tree_of_classes() -> None:
    drawn: list[str] = [
        word
        for line in (errors.__doc__ or "").splitlines()
        for word in line.strip("│├└─ ").split()[:1]
        if hasattr(errors, word)
    ]

    def walk(kind: type[errors.QuantgateError]) -> list[str]:
        of_module = [k for k in kind.__subclasses__() if k.__module__ == errors.__name__]
        return [kind.__name__, *(name for k in of_module for name in walk(k))]

    assert drawn == walk(errors.QuantgateError)
