"""From a table to a golden set: which column holds the prompt, the answer, the choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantgate.errors import GoldenSetError
from quantgate.quality.imported.folder import ImportedSet
from quantgate.quality.imported.table import Row, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns mean what, and how an item is asked."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    """Several columns of one choice each, or one column with a list; none: the model generates."""
    labels: str | None = None
    """Names of the choices, where answers are such names; with several columns, theirs."""
    id: str | None = None
    tags: tuple[str, ...] = ()
    cluster: str | None = None
    is_chat: bool = False
    delimiter: str | None = None
    """Between prompt and choice. None: nothing after white space or a chat turn, else a space."""
    metrics: tuple[str, ...] = ("exact_match",)
    max_tokens: int = 64
    until: tuple[str, ...] = ()


def import_table(table: Table, columns: Columns, *, name: str) -> ImportedSet:
    """A golden set of a table's rows.

    Raises:
        GoldenSetError: with file and line; a column that is not there, an empty cell, a duplicate
            id, an answer that is none of the choices.
    """
    answers = [row.text(columns.answer) for row in table.rows]
    choices: list[list[str]] = [[] for _ in table.rows]
    if columns.choices:
        choices = [_choices(row, columns.choices) for row in table.rows]
        answers = _chosen_texts(table.rows, columns, answers, choices)
    rows = [
        (row.line, _item(row, columns, answer, options, name=f"{name}-{index:05}"))
        for index, (row, answer, options) in enumerate(
            zip(table.rows, answers, choices, strict=True)
        )
    ]
    used = {"prompt": columns.prompt, "answer": columns.answer, "id": columns.id}
    used |= {"choices": ", ".join(columns.choices), "tags": ", ".join(columns.tags)}
    used |= {"cluster": columns.cluster}
    return ImportedSet(
        task=_task(columns, name),
        rows=tuple(rows),
        source=f"{table.path}:",
        origin=f"`{table.path.name}` (sha256 {table.sha256[:16]}…), "
        + ", ".join(f"{meaning} from `{column}`" for meaning, column in used.items() if column),
        metadata={"file": table.path.name, "sha256": table.sha256},
    )


def _task(columns: Columns, name: str) -> dict[str, Any]:
    metrics = [{"metric": metric} for metric in columns.metrics]
    if columns.choices:
        return {
            "task": name,
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "metric_list": metrics,
        }
    return {
        "task": name,
        "output_type": "generate_until",
        "generation_kwargs": {"max_gen_toks": columns.max_tokens, "until": list(columns.until)},
        "metric_list": metrics,
        "validity": [{"type": "non_empty"}, {"type": "finished"}],
    }


def _item(
    row: Row, columns: Columns, answer: str, choices: Sequence[str], *, name: str
) -> dict[str, Any]:
    prompt = row.text(columns.prompt)
    item: dict[str, Any] = {"id": row.text(columns.id) if columns.id else name}
    item["input"] = [{"role": "user", "content": prompt}] if columns.is_chat else prompt
    item["target"] = answer
    if choices:
        delimiter = columns.delimiter
        if delimiter is None:
            delimiter = "" if columns.is_chat or prompt[-1].isspace() else " "
        item["target"] = delimiter + answer
        item["choices"] = [delimiter + choice for choice in choices]
    tags = [tag for column in columns.tags for tag in _tags(row, column)]
    if tags:
        item["tags"] = tags
    if columns.cluster:
        item["cluster"] = row.text(columns.cluster)
    return item


def _tags(row: Row, column: str) -> list[str]:
    """`length:long` for the cell `long`; an empty cell is no tag, and a list is several."""
    value = row.value(column)
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [f"{column}:{part}" for part in value]
    return [f"{column}:{row.text(column)}"]


def _choices(row: Row, columns: Sequence[str]) -> list[str]:
    if len(columns) > 1:
        return [row.text(column) for column in columns]
    return _list(row, columns[0])


def _list(row: Row, column: str) -> list[str]:
    value = row.value(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise GoldenSetError(
            f"{row.where}: column {column!r} holds {row.value(column)!r:.40}; expected a JSON list "
            'of texts, such as ["yes", "no"], or name one column per choice.'
        )
    return value


def _chosen_texts(
    rows: Sequence[Row],
    columns: Columns,
    answers: Sequence[str],
    choices: Sequence[Sequence[str]],
) -> list[str]:
    """What each answer says in words: answers are texts, names or positions, alike in all rows.

    Raises:
        GoldenSetError: an answer is none of them, or all could be meant two ways.
    """
    readings = [
        [read(*one, columns) for one in zip(rows, answers, choices, strict=True)]
        for read in (_as_text, _as_label, _as_position)
    ]
    whole = [reading for reading in readings if None not in reading]
    if not whole:
        best = max(readings, key=lambda reading: len(reading) - reading.count(None))
        first = best.index(None)
        raise GoldenSetError(
            f"{rows[first].where}: answer {answers[first]!r} is none of the choices "
            f"{list(choices[first])!r}{_names_in_words(rows[first], columns)}."
        )
    if any(reading != whole[0] for reading in whole[1:]):
        raise GoldenSetError(
            f"{rows[0].where}: column {columns.answer!r} could hold the choices' texts, or their "
            "names or positions, and these differ; write the texts."
        )
    return [text for text in whole[0] if text is not None]


def _as_text(_: Row, answer: str, choices: Sequence[str], columns: Columns) -> str | None:
    return answer if answer in choices else None


def _as_label(row: Row, answer: str, choices: Sequence[str], columns: Columns) -> str | None:
    labels = _labels(row, columns)
    return choices[labels.index(answer)] if answer in labels else None


def _as_position(row: Row, _: str, choices: Sequence[str], columns: Columns) -> str | None:
    # Only a JSON number: in a CSV, "1" might as well be the second choice as the first.
    value = row.value(columns.answer)
    is_position = isinstance(value, int) and not isinstance(value, bool)
    return choices[value] if is_position and 0 <= value < len(choices) else None


def _labels(row: Row, columns: Columns) -> list[str]:
    if columns.labels:
        labels = _list(row, columns.labels)
        if len(labels) != len(_choices(row, columns.choices)):
            raise GoldenSetError(
                f"{row.where}: column {columns.labels!r} names {len(labels)} choices, but there "
                f"are {len(_choices(row, columns.choices))}."
            )
        return labels
    return list(columns.choices) if len(columns.choices) > 1 else []


def _names_in_words(row: Row, columns: Columns) -> str:
    labels = _labels(row, columns)
    return f", nor one of their names {', '.join(labels)}" if labels else ""
