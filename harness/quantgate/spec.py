"""YAML that remembers its lines: every error about what a person wrote carries `file:line`.

Knows nothing of policies; `policy.py` says what may be written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from yaml.constructor import SafeConstructor

from quantgate.errors import UsageError

_PLAIN_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

Location: TypeAlias = tuple[str | int, ...]
"""The way to a value: mapping keys and list positions, as pydantic reports them."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong, and on which line it stands."""

    line: int
    message: str


class SpecError(UsageError):
    """A file that says something it may not; prints one `file:line: message` per problem."""

    def __init__(self, path: Path, problems: Iterable[Problem]) -> None:
        self.path = path
        self.problems = tuple(sorted(set(problems)))
        super().__init__("\n".join(f"{path}:{p.line}: {p.message}" for p in self.problems))

    @property
    def line(self) -> int:
        return self.problems[0].line

    @property
    def message(self) -> str:
        return self.problems[0].message


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed YAML file: its bytes, its plain data, and the line of every key and item."""

    path: Path
    content: bytes
    data: dict[str, Any]
    lines: dict[Location, int]

    def line_of(self, location: Location) -> int:
        """The line of a key or item, or of the nearest one above it that exists."""
        for end in range(len(location), 0, -1):
            if location[:end] in self.lines:
                return self.lines[location[:end]]
        return 1

    def problem(self, location: Location, message: str) -> Problem:
        return Problem(self.line_of(location), message)


def read_document(path: Path) -> Document:
    """Read one YAML mapping.

    Raises:
        SpecError: not a readable UTF-8 YAML mapping, a key written twice, or a tag that is not
            plain data.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise SpecError(path, [Problem(1, f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SpecError(path, [Problem(line, "not UTF-8 text; save the file as UTF-8")]) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            message = "expected a mapping of keys to values; write: name: my-policy"
            raise SpecError(path, [Problem(1, message)])
        reader = _NodeReader(path)
        data = reader.read_mapping(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise SpecError(path, [Problem(line, f"not YAML: {error.problem}")]) from error
    except yaml.YAMLError as error:
        raise SpecError(path, [Problem(1, f"not YAML: {error}")]) from error
    return Document(path, content, data, reader.lines)


class _NodeReader:
    """Turns YAML nodes into plain data, noting where each stood."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._constructor = SafeConstructor()
        self._open: list[yaml.Node] = []
        self.lines: dict[Location, int] = {}

    def read_mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise SpecError(self._path, [Problem(_line(key_node), "a key must be text")])
            inner = (*location, key)
            if inner in self.lines:
                message = f'"{key}" is written twice (first on line {self.lines[inner]}); keep one'
                raise SpecError(self._path, [Problem(_line(key_node), message)])
            self.lines[inner] = _line(key_node)
            data[key] = self._read(value_node, inner)
        return data

    def _read(self, node: yaml.Node, location: Location) -> Any:
        if any(node is parent for parent in self._open):
            message = "an alias to a value that contains it; write the value out"
            raise SpecError(self._path, [Problem(_line(node), message)])
        self._open.append(node)
        try:
            if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN_COLLECTIONS:
                raise SpecError(
                    self._path, [Problem(_line(node), f"the tag {node.tag} is not data")]
                )
            if isinstance(node, yaml.MappingNode):
                return self.read_mapping(node, location)
            if isinstance(node, yaml.SequenceNode):
                return self._read_sequence(node, location)
            return self._constructor.construct_object(node)
        except ValueError as error:
            # The constructor lets through what Python refuses, for example the date 2026-02-31.
            problem = Problem(_line(node), f"not a value: {error}")
            raise SpecError(self._path, [problem]) from error
        finally:
            self._open.pop()

    def _read_sequence(self, node: yaml.SequenceNode, location: Location) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            inner = (*location, index)
            self.lines[inner] = _line(item)
            items.append(self._read(item, inner))
        return items


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1 if node.start_mark is not None else 1
