"""Calibration text, with the line of each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantgate.errors import UsageError
from quantgate.files import sha256_of_file
from quantgate.variants.calibration import load_calibration
from quantgate.variants.source import SourceModel, open_source


@pytest.fixture
def source(model_folder: Path) -> SourceModel:
    return open_source(str(model_folder))


def test_documents_and_tokens_are_cut_and_the_file_is_remembered(
    source: SourceModel, tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "abcd"}\n\n{"text": "ef"}\n{"text": "g"}\n', encoding="utf-8")
    found = load_calibration(path, source, max_documents=2, max_tokens=3)
    assert found.texts == ["abcd", "ef"]
    assert [len(ids) for ids in found.ids] == [3, 2]
    assert found.provenance.num_documents == 2
    assert found.provenance.num_tokens == 5
    assert (found.provenance.path, found.provenance.sha256) == ("c.jsonl", sha256_of_file(path))


def test_a_separator_inside_a_document_does_not_end_its_line(
    source: SourceModel, tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert load_calibration(path, source, max_documents=2, max_tokens=9).texts == ["a\u2028b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", 'expected a JSON object with "text"'),
        (b"[]", 'expected a JSON object with "text"'),
        (b'{"prompt": "x"}', 'expected a JSON object with "text"'),
        (b'{"text": ""}', "text is empty"),
        (b'{"text": 3}', "text is empty"),
    ],
)
def test_a_line_without_text_is_named(
    source: SourceModel, tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(UsageError, match=r"c\.jsonl:2: ") as caught:
        load_calibration(path, source, max_documents=9, max_tokens=9)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n", "no documents"), (b"\xff", "not UTF-8"), (None, "cannot be")]
)
def test_a_file_without_documents_is_refused(
    source: SourceModel, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "c.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_calibration(path, source, max_documents=9, max_tokens=9)
