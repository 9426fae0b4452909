"""Tables are read as they stand: nothing is guessed, and a mistake is named by its line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.errors import GoldenSetError
from quantgate.quality.imported.table import read_csv, read_jsonl

CELL = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)


def write(tmp_path: Path, data: bytes | str, *, name: str = "faq.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def test_cells_stay_text_and_know_their_line(tmp_path: Path) -> None:
    table = read_csv(write(tmp_path, "q,a\n007,true\n\nx,1.50\n"))
    assert [(row.line, dict(row.values)) for row in table.rows] == [
        (2, {"q": "007", "a": "true"}),
        (4, {"q": "x", "a": "1.50"}),
    ]


def test_a_record_with_line_breaks_is_named_by_the_line_it_begins_on(tmp_path: Path) -> None:
    path = write(tmp_path, 'q,a\n"two\nlines",b\nnext,c,d\n')
    with pytest.raises(GoldenSetError, match=rf"{path}:4: 3 cells, but the header has 2 columns"):
        read_csv(path)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (row,) = read_csv(write(tmp_path, "\ufeffq,a\r\nx,y\r\n")).rows
    assert dict(row.values) == {"q": "x", "a": "y"}


def test_tabs_separate_the_cells_of_a_tsv_and_anything_that_is_said(tmp_path: Path) -> None:
    (row,) = read_csv(write(tmp_path, "q\ta\nx,1\ty\n", name="faq.tsv")).rows
    assert dict(row.values) == {"q": "x,1", "a": "y"}
    (row,) = read_csv(write(tmp_path, "q;a\nx;y\n", name="faq.txt"), separator=";").rows
    assert dict(row.values) == {"q": "x", "a": "y"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("q,a\nx\n", ":2: 1 cells, but the header has 2 columns"),
        ("q,a\nx,y\nx,y,z\n", ":3: 3 cells, but the header has 2 columns"),
        ('q,a\nx,y\n"open,z\n', ":3: not CSV (unexpected end of data)"),
        ('q,a\nx,"y"z\n', ":2: not CSV"),
        (b"q,a\nx,y\ncaf\xe9,z\n", ":3: not UTF-8 (byte 0xe9"),
        ("q,a\nx,y\n".encode("utf-16"), ":1: UTF-16, by its byte order mark; save it as UTF-8"),
        ("q,q\nx,y\n", ":1: column 'q' is named twice"),
        ("q,\nx,y\n", ":1: column '' is nameless"),
        ("q,a\n", ": no records below the header"),
        ("", ": no records below the header"),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, data: bytes | str, message: str
) -> None:
    path = write(tmp_path, data)
    with pytest.raises(GoldenSetError) as caught:
        read_csv(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_file_that_is_missing_or_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GoldenSetError, match="no such file"):
        read_csv(tmp_path / "nowhere.csv")
    with pytest.raises(GoldenSetError, match="say --separator"):
        read_csv(write(tmp_path, "q,a\nx,y\n", name="faq.xlsx"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"q": 1}\nx\n', ":2: not JSON"),
        (b'{"q": 1}\n{"q": "\xe9"}\n', ":2: not UTF-8 (byte 0xe9"),
        ("\n", ": no records"),
    ],
)
def test_broken_json_lines_are_named_with_their_line(
    tmp_path: Path, data: bytes | str, message: str
) -> None:
    path = write(tmp_path, data, name="faq.jsonl")
    with pytest.raises(GoldenSetError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_value_inside_an_object_is_found_by_its_path(tmp_path: Path) -> None:
    line = json.dumps({"choices": {"text": ["a", "b"]}, "n": 3, "none": None, "yes": True})
    (row,) = read_jsonl(write(tmp_path, line, name="arc.jsonl")).rows
    assert row.value("choices.text") == ["a", "b"]
    assert row.text("n") == "3"
    for column, message in (
        ("choices.label", "no column 'choices.label'; there are choices, n, none, yes"),
        ("none", "column 'none' is empty"),
        ("yes", "column 'yes' holds True; expected text"),
        ("choices", "expected text"),
    ):
        with pytest.raises(GoldenSetError, match=message):
            row.text(column)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_what_a_csv_writer_wrote_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, str]]
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("q", "a"), *records])
    path = write(tmp_path_factory.mktemp("csv"), text.getvalue())
    assert [tuple(row.values.values()) for row in read_csv(path).rows] == records
