"""Golden sets: versioned items with known answers, and a task that says how they are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantgate.errors import GoldenSetError
from quantgate.files import sha256_of_json
from quantgate.quality.golden_items import GoldenItem, parse_items, read_json_lines
from quantgate.quality.task import Task, read_task

if TYPE_CHECKING:
    from datasets import Dataset

ITEMS_NAME = "items.jsonl"
TASK_NAME = "task.yaml"


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
    task = read_task(folder / TASK_NAME)
    items = parse_items(read_json_lines(path), task, source=f"{path}:")
    if not items:
        raise GoldenSetError(f"{path}: no items; expected one JSON object per line.")
    return GoldenSet(name=folder.name, folder=folder, task=task, items=items)
