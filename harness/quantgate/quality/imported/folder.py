"""Writing an imported golden set: items.jsonl, task.yaml and CARD.md, whole or not at all."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from quantgate.errors import GoldenSetError, UsageError
from quantgate.files import write_text
from quantgate.quality.golden import ITEMS_NAME, TASK_NAME
from quantgate.quality.golden_items import GoldenItem, parse_items
from quantgate.quality.task import Task

CARD_NAME = "CARD.md"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedSet:
    """Items and a task that came from elsewhere, as they will be written."""

    task: Mapping[str, Any]
    """task.yaml, without its metadata."""
    rows: tuple[tuple[int, dict[str, Any]], ...]
    """(number, item): the line or document each item came from."""
    source: str
    """What stands before a row's number in an error."""
    origin: str
    """Where the set came from, for its card."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def checked_name(out: Path) -> str:
    """The name of the set that a folder will hold.

    Raises:
        UsageError: metrics cannot be named for it, or the folder is there already.
    """
    if not _NAME.fullmatch(out.name):
        raise UsageError(
            f"--out {out}: metrics are named for the folder (quality/{out.name}.exact_match), so "
            "its name is letters, digits, - and _."
        )
    if (out / ITEMS_NAME).exists() or (out / TASK_NAME).exists():
        raise UsageError(f"--out {out}: holds a golden set already; name another folder.")
    return out.name


def write_imported(found: ImportedSet, out: Path) -> tuple[GoldenItem, ...]:
    """Checks a set as its reader will, then writes it; nothing is written if anything is wrong.

    Raises:
        GoldenSetError: with the row of the file or task that it came from.
    """
    name = checked_name(out)
    value = dict(found.task) | {"metadata": dict(found.metadata)}
    try:
        task = Task.model_validate(value)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()
        )
        raise GoldenSetError(f"{name}: {reasons}.") from error
    lines = [_line(item, f"{found.source}{number}") for number, item in found.rows]
    items = parse_items(((n, dict(item)) for n, item in found.rows), task, source=found.source)
    # The items come last: a folder without them is not taken for a golden set.
    write_text(out / CARD_NAME, _card(name, found, items))
    write_text(out / TASK_NAME, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    write_text(out / ITEMS_NAME, "".join(lines))
    return items


def _line(item: Mapping[str, Any], where: str) -> str:
    line = json.dumps(item, ensure_ascii=False) + "\n"
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GoldenSetError(
            f"{where}: half of a surrogate pair, which is no character."
        ) from error
    return line


def _card(name: str, found: ImportedSet, items: tuple[GoldenItem, ...]) -> str:
    tags = Counter(tag for item in items for tag in item.tags)
    table = "".join(f"| `{tag}` | {count} |\n" for tag, count in sorted(tags.items()))
    return (
        f"# {name}\n\n"
        "What is asked, and why it matters here: write it down before the set judges a release.\n\n"
        f"- **Size**: {len(items)} items in {len({item.cluster for item in items})} clusters.\n"
        f"- **Made from**: {found.origin}.\n"
        "- **Licence**: not stated by the source; write it here.\n"
        + (f"\n| tag | items |\n|---|---|\n{table}" if table else "")
    )
