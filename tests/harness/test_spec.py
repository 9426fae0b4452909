"""YAML with lines: where each thing stands, and what is refused before any schema sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantgate.errors import UsageError
from quantgate.spec import Problem, SpecError, read_document


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path: Path, text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        read_document(written(tmp_path, text))
    return caught.value


def test_every_key_and_item_knows_its_line(tmp_path: Path) -> None:
    document = read_document(
        written(tmp_path, "a: 1\nb:\n  c: [1,\n    2]\n  d:\n    - e: x\n    - e: y\n")
    )
    assert document.data == {"a": 1, "b": {"c": [1, 2], "d": [{"e": "x"}, {"e": "y"}]}}
    assert document.line_of(("b", "c")) == 3
    assert document.line_of(("b", "c", 1)) == 4
    assert document.line_of(("b", "d", 1, "e")) == 7


def test_a_place_that_does_not_exist_has_the_line_of_what_is_above_it(tmp_path: Path) -> None:
    document = read_document(written(tmp_path, "a: 1\nb: {c: 2}\n"))
    assert document.line_of(("b", "missing", 0)) == 2
    assert document.line_of(("missing",)) == 1


def test_anchors_are_plain_repetition(tmp_path: Path) -> None:
    document = read_document(written(tmp_path, "a: &x [1]\nb: *x\n"))
    assert document.data == {"a": [1], "b": [1]}


def test_a_key_written_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    error = refused(tmp_path, "a: 1\nb: 2\na: 3\n")
    assert error.line == 3
    assert error.message == '"a" is written twice (first on line 1); keep one'


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: [1\n", 2, "not YAML"),
        ("a: 1\n\tb: 2\n", 2, "not YAML"),
        ("- a\n", 1, "expected a mapping"),
        ("", 1, "expected a mapping"),
        ("a: 1\n? [b, c]\n: 2\n", 2, "a key must be text"),
        ("a: 1\nb: !!python/object:os.system {}\n", 2, "python/object:os.system is not data"),
        ("a: 1\nb: !wrong x\n", 2, "could not determine a constructor"),
        ("a: 1\nb: 2026-02-31\n", 2, "not a value: day is out of range"),
        ("a: 1\nb: &b [*b]\n", 2, "an alias to a value that contains it"),
        ("a: *nowhere\n", 1, "undefined alias"),
        ("a: \x07\n", 1, "not YAML"),
    ],
)
def test_what_is_not_plain_data_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    error = refused(tmp_path, text)
    assert error.line == line
    assert message in error.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml:1: cannot be read: No such file"):
        read_document(tmp_path / "none.yaml")


def test_bytes_that_are_not_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(SpecError, match="2: not UTF-8"):
        read_document(path)


def test_an_error_prints_every_problem_once_in_the_order_of_lines() -> None:
    error = SpecError(Path("p.yaml"), [Problem(9, "b"), Problem(2, "a"), Problem(9, "b")])
    assert str(error) == "p.yaml:2: a\np.yaml:9: b"
    assert (error.line, error.message) == (2, "a")
    assert isinstance(error, UsageError)
