"""Tables people have, CSV or JSON lines, as rows that know the line they begin on.

Read here and not through `datasets`, which guesses types (007 becomes 7, an empty cell becomes
None) and forgets lines.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.errors import GoldenSetError
from quantgate.files import sha256_of_bytes
from quantgate.quality.golden_items import decode, read_json_lines

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record. Values are text in a CSV; in JSON lines, whatever JSON can say."""

    where: str
    line: int
    values: Mapping[str, Any]

    def value(self, column: str) -> Any:
        """A value, found also inside objects: `choices.text`.

        Raises:
            GoldenSetError: the record has no such value.
        """
        if column in self.values:
            return self.values[column]
        found: Any = self.values
        for part in column.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise GoldenSetError(
                    f"{self.where}: no column {column!r}; there are {', '.join(self.values)}."
                )
            found = found[part]
        return found

    def text(self, column: str) -> str:
        """A value that must be text, or a number, and must say something.

        Raises:
            GoldenSetError: it is empty, or a list or an object.
        """
        value = self.value(column)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise GoldenSetError(f"{self.where}: column {column!r} is empty.")
        if not isinstance(value, str):
            raise GoldenSetError(
                f"{self.where}: column {column!r} holds {value!r:.40}; expected text."
            )
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The records of one file, in order."""

    path: Path
    sha256: str
    rows: tuple[Row, ...]


def read_csv(path: Path, *, separator: str | None = None) -> Table:
    """Reads a CSV with a header line; `separator` follows from the file's name unless given.

    A byte order mark is no part of the first column's name, and blank lines are no records.

    Raises:
        GoldenSetError: with file and line; other bytes than UTF-8, a column named twice, a record
            with more or fewer cells than the header, an open quote, no records.
    """
    data = _read(path)
    rows = tuple(_records(path, decode(data, path), separator or _separator_of(path)))
    return _table(path, data, rows)


def read_jsonl(path: Path) -> Table:
    """Reads JSON lines, as `datasets.Dataset.to_json` writes them.

    Raises:
        GoldenSetError: with file and line; other bytes than UTF-8, a line that is no JSON object.
    """
    data = _read(path)
    rows = tuple(
        Row(where=f"{path}:{line}", line=line, values=value)
        for line, value in read_json_lines(path)
    )
    return _table(path, data, rows)


def _table(path: Path, data: bytes, rows: tuple[Row, ...]) -> Table:
    if not rows:
        raise GoldenSetError(f"{path}: no records below the header.")
    return Table(path=path, sha256=sha256_of_bytes(data), rows=rows)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise GoldenSetError(f"{path}: no such file.") from error


def _separator_of(path: Path) -> str:
    separator = _SEPARATORS.get(path.suffix.lower())
    if separator is None:
        raise GoldenSetError(
            f"{path}: expected .csv (commas) or .tsv (tabs); say --separator for another name."
        )
    return separator


def _records(path: Path, text: str, separator: str) -> Iterator[Row]:
    # A cell may be a whole document; Python's own limit is 128 KiB.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            where = f"{path}:{line}"
            if not header and cells:
                header = _checked_header(cells, where)
            elif cells:
                yield Row(where=where, line=line, values=_checked_cells(header, cells, where))
            # A quoted cell may hold line breaks, so a record begins where the last one ended.
            line = reader.line_num + 1
    except csv.Error as error:
        raise GoldenSetError(
            f"{path}:{line}: not CSV ({error}); a quote inside a quoted cell is written twice."
        ) from error


def _checked_header(cells: list[str], where: str) -> list[str]:
    for name in cells:
        if not name.strip() or cells.count(name) > 1:
            raise GoldenSetError(
                f"{where}: column {name!r} is {'nameless' if not name.strip() else 'named twice'}; "
                "every column needs a name of its own."
            )
    return cells


def _checked_cells(header: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise GoldenSetError(
            f"{where}: {len(cells)} cells, but the header has {len(header)} columns; "
            "a cell that holds the separator needs quotes."
        )
    return dict(zip(header, cells, strict=True))
