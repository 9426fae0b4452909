"""Golden sets: versioned items with known answers, read strictly, with the line of each mistake."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from quantgate.errors import GoldenSetError
from quantgate.files import sha256_of_json
from quantgate.quality.validity import ValidityCheck
from quantgate.quality.words import words_of
from quantgate.spec import SpecError, read_document

if TYPE_CHECKING:
    from datasets import Dataset

OutputType = Literal["generate_until", "multiple_choice", "loglikelihood_rolling"]

ITEMS_NAME = "items.jsonl"
TASK_NAME = "task.yaml"

# Names other tools write for the same fields.
_ALIASES = {"prompt": "input", "ideal": "target", "expected_output": "target"}
_NEEDED_WORDS = {"rouge1": 1, "rouge2": 2, "rougeL": 1, "token_f1": 1}
"""Fewer in a target leave a scorer nothing to find."""
_FIELDS = ("id", "input", "target", "choices", "tags", "cluster", "metadata")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GenerationKwargs(_Strict):
    """How answers are generated; greedy only, since a gate compares item by item."""

    max_gen_toks: int = Field(default=64, ge=1)
    until: tuple[str, ...] = ()
    temperature: float = Field(default=0.0, ge=0.0, le=0.0)


class MetricSpec(_Strict):
    """One scorer, by its lm-evaluation-harness name."""

    metric: Literal[
        "exact_match", "exact_text", "json_fields", "rouge1", "rouge2", "rougeL", "token_f1"
    ]
    higher_is_better: Literal[True] = True


class Task(_Strict):
    """task.yaml, in lm-evaluation-harness names."""

    task: str
    output_type: OutputType
    doc_to_text: Literal["input"] = "input"
    doc_to_target: Literal["target"] = "target"
    doc_to_choice: Literal["choices"] | None = None
    num_fewshot: Literal[0] = 0
    generation_kwargs: GenerationKwargs = GenerationKwargs()
    metric_list: tuple[MetricSpec, ...] = ()
    validity: tuple[ValidityCheck, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_its_output_type(self) -> Task:
        if self.output_type != "loglikelihood_rolling" and not self.metric_list:
            raise ValueError("metric_list is empty: nothing would be scored")
        if self.output_type == "multiple_choice" and self.doc_to_choice is None:
            raise ValueError("multiple_choice needs `doc_to_choice: choices`")
        if self.output_type != "generate_until" and self.validity:
            raise ValueError(
                f"validity checks what was generated, and {self.output_type} generates nothing; "
                "remove it"
            )
        return self


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


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenSet:
    """A folder of items with a task."""

    name: str
    folder: Path
    task: Task
    items: tuple[GoldenItem, ...]

    @property
    def items_sha256(self) -> str:
        ordered = sorted(self.items, key=lambda item: item.id)
        return sha256_of_json([item.canonical() for item in ordered])

    @property
    def task_sha256(self) -> str:
        return sha256_of_json(self.task.model_dump(mode="json", by_alias=True))

    def tag_counts(self) -> dict[str, int]:
        counts = Counter(tag for item in self.items for tag in item.tags)
        return dict(sorted(counts.items()))

    def dataset(self) -> Dataset:
        """The items as a `datasets.Dataset`, in file order, for people's own analysis."""
        from datasets import Dataset

        return Dataset.from_list([item.canonical() for item in self.items])


def find_golden_set(name: str, *, folders: Sequence[Path]) -> Path:
    """The folder of a golden set named in a policy: a path, or a name inside one of `folders`.

    Raises:
        GoldenSetError: there is none; says where it was looked for.
    """
    candidates = [*(folder / name for folder in folders), Path(name)]
    for folder in candidates:
        if (folder / ITEMS_NAME).is_file():
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    raise GoldenSetError(f"golden set {name!r} not found; looked for {ITEMS_NAME} in {looked}.")


def load_golden_set(folder: Path) -> GoldenSet:
    """Reads a golden set; nothing is dropped silently.

    Raises:
        GoldenSetError: with file and line; a missing file, an unknown field, a duplicate id, an
            empty input or target, a target that is none of the choices.
    """
    path = folder / ITEMS_NAME
    task = _read_task(folder / TASK_NAME)
    items = parse_items(read_json_lines(path), task, source=f"{path}:")
    if not items:
        raise GoldenSetError(f"{path}: no items; expected one JSON object per line.")
    return GoldenSet(name=folder.name, folder=folder, task=task, items=items)


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


def _read_task(path: Path) -> Task:
    if not path.exists():
        raise GoldenSetError(
            f"{path}: missing; expected the task in lm-evaluation-harness names "
            "(task, output_type, metric_list, generation_kwargs)."
        )
    try:
        document = read_document(path)
    except SpecError as error:
        raise GoldenSetError(str(error)) from error
    try:
        return Task.model_validate(document.data)
    except ValidationError as error:
        problems = [document.problem(tuple(one["loc"]), _in_words(one)) for one in error.errors()]
        raise GoldenSetError(str(SpecError(path, problems))) from error


def _in_words(error: ErrorDetails) -> str:
    keys = ".".join(part for part in error["loc"] if isinstance(part, str))
    message = error["msg"].removeprefix("Value error, ")
    return f"{keys}: {message}" if keys else message


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
            value = json.loads(line)
        except ValueError as error:
            raise GoldenSetError(f"{path}:{number}: not JSON ({error}).") from error
        if not isinstance(value, dict):
            raise GoldenSetError(f"{path}:{number}: expected a JSON object, found {value!r:.40}.")
        yield number, value


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
