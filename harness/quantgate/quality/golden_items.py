"""The items of a golden set, read strictly, with the line of each mistake."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.errors import GoldenSetError
from quantgate.quality.task import Task
from quantgate.quality.words import words_of

# Names other tools write for the same fields.
_ALIASES = {"prompt": "input", "ideal": "target", "expected_output": "target"}
_NEEDED_WORDS = {"rouge1": 1, "rouge2": 2, "rougeL": 1, "token_f1": 1}
"""Fewer in a target leave a scorer nothing to find."""
_FIELDS = ("id", "input", "target", "choices", "tags", "cluster", "metadata")


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenItem:
    """One item. `messages` is None for an input that is plain text."""

    id: str
    text: str | None
    messages: tuple[Mapping[str, str], ...] | None
    target: str
    choices: tuple[str, ...]
    tags: tuple[str, ...]
    cluster: str
    line: int

    def canonical(self) -> dict[str, Any]:
        """What the lock covers: everything but the line, with text in NFC."""
        messages = [dict(m) for m in self.messages] if self.messages is not None else None
        value = {
            "id": self.id,
            "input": messages if messages is not None else self.text,
            "target": self.target,
            "choices": list(self.choices),
            "tags": sorted(self.tags),
            "cluster": self.cluster,
        }
        normal: dict[str, Any] = json.loads(
            unicodedata.normalize("NFC", json.dumps(value, ensure_ascii=False))
        )
        return normal


def parse_items(
    rows: Iterable[tuple[int, dict[str, Any]]], task: Task, *, source: str
) -> tuple[GoldenItem, ...]:
    """Items from numbered rows; `source` stands before a row's number in every error.

    Raises:
        GoldenSetError: an unknown field, a duplicate id, an empty input or target, a target that is
            none of the choices.
    """
    items = []
    seen: dict[str, int] = {}
    for number, value in rows:
        item = _parse_item(value, task, where=f"{source}{number}", line=number)
        if item.id in seen:
            raise GoldenSetError(
                f"{source}{number}: id {item.id!r} was used on line {seen[item.id]} already; "
                "ids must be unique, since items are paired by them."
            )
        seen[item.id] = number
        items.append(item)
    return tuple(items)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line of a file that is not blank.

    Raises:
        GoldenSetError: a missing file, other bytes than UTF-8, a line that is no JSON object.
    """
    try:
        text = decode(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise GoldenSetError(f"{path}: missing; expected one JSON object per line.") from error
    # Not splitlines(): it also splits at separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_once)
        except ValueError as error:
            raise GoldenSetError(f"{path}:{number}: not JSON ({error}).") from error
        if "\\u" in line and _has_lone_surrogate(value):
            raise GoldenSetError(
                f"{path}:{number}: half of a surrogate pair, which is no character."
            )
        if not isinstance(value, dict):
            raise GoldenSetError(f"{path}:{number}: expected a JSON object, found {value!r:.40}.")
        yield number, value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which nothing is dropped silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _has_lone_surrogate(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def decode(data: bytes, path: Path) -> str:
    """The text of a file, without the byte order mark that spreadsheets write.

    Raises:
        GoldenSetError: with the line; it is not UTF-8.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise GoldenSetError(f"{path}:1: UTF-16, by its byte order mark; save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise GoldenSetError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}: {error.reason}); "
            "save the file as UTF-8."
        ) from error


def _parse_item(value: dict[str, Any], task: Task, *, where: str, line: int) -> GoldenItem:
    for alias, name in _ALIASES.items():
        if alias in value:
            if name in value:
                raise GoldenSetError(f"{where}: both {name!r} and its alias {alias!r}; keep one.")
            value[name] = value.pop(alias)
    unknown = sorted(value.keys() - set(_FIELDS))
    if unknown:
        raise GoldenSetError(
            f"{where}: unknown field {unknown[0]!r}; expected {', '.join(_FIELDS)}."
        )
    item_id = value.get("id")
    if not isinstance(item_id, str) or not item_id:
        raise GoldenSetError(f"{where}: id is missing or empty; expected a unique string.")
    text, messages = _parse_input(value.get("input"), where)
    target = value.get("target", "")
    if isinstance(target, list) and len(target) == 1:
        target = target[0]
    choices = _parse_texts(value, "choices", where)
    _check_target(target, choices, task, where)
    cluster = value.get("cluster")
    return GoldenItem(
        id=item_id,
        text=text,
        messages=messages,
        target=target,
        choices=choices,
        tags=_parse_texts(value, "tags", where),
        # An item without a cluster is a document of its own.
        cluster=item_id if cluster is None else str(cluster),
        line=line,
    )


def _parse_input(
    value: object, where: str
) -> tuple[str | None, tuple[Mapping[str, str], ...] | None]:
    if isinstance(value, str) and value:
        return value, None
    if isinstance(value, list) and value:
        for message in value:
            if (
                not isinstance(message, dict)
                or message.keys() != {"role", "content"}
                or not all(isinstance(part, str) for part in message.values())
            ):
                raise GoldenSetError(
                    f'{where}: a message must be {{"role": ..., "content": ...}}, '
                    f"found {message!r:.60}."
                )
        return None, tuple(value)
    raise GoldenSetError(f"{where}: input is missing or empty; expected text or chat messages.")


def _parse_texts(value: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    texts = value.get(name)
    if texts is None:
        return ()
    # A bare string would silently become a list of its letters.
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise GoldenSetError(f"{where}: {name} is {texts!r:.60}; expected a list of strings.")
    return tuple(texts)


def _check_target(target: object, choices: tuple[str, ...], task: Task, where: str) -> None:
    if task.output_type == "loglikelihood_rolling" and target == "":
        return
    if isinstance(target, list):
        raise GoldenSetError(f"{where}: target has {len(target)} answers; expected one.")
    if not isinstance(target, str) or not target.strip():
        raise GoldenSetError(f"{where}: target is missing or empty; expected the known answer.")
    for spec in task.metric_list:
        if spec.metric == "json_fields":
            _check_json_target(target, where)
        elif spec.metric in _NEEDED_WORDS:
            _check_words(target, spec.metric, where)
    if task.output_type != "multiple_choice":
        return
    if len(choices) < 2 or len(set(choices)) != len(choices):
        raise GoldenSetError(f"{where}: choices must be at least two different strings.")
    if target not in choices:
        raise GoldenSetError(f"{where}: target {target!r} is none of the choices {choices!r}.")


def _check_words(target: str, scorer: str, where: str) -> None:
    found, needed = len(words_of(target)), _NEEDED_WORDS[scorer]
    if found < needed:
        raise GoldenSetError(
            f"{where}: target {target!r:.40} has {found} words, and {scorer} compares at least "
            f"{needed}: every answer would score 0. Write a longer target, or use exact_match."
        )


def _check_json_target(target: str, where: str) -> None:
    try:
        value = json.loads(target)
    except ValueError as error:
        raise GoldenSetError(
            f"{where}: target is not JSON ({error}), and json_fields compares it field by field."
        ) from error
    if not isinstance(value, dict) or not value:
        raise GoldenSetError(
            f"{where}: target {target!r:.40} has no fields; json_fields needs a JSON object."
        )
