"""golden.lock.json: proof that a golden set is the one that was agreed on.

The lock covers the canonical items, the task, the scorers, the tokenizer, the chat template and the
rendered prompts. A verdict on a set that differs from its lock is INVALID, never FAIL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantgate.errors import GoldenSetError
from quantgate.files import read_json, sha256_of_json, write_json
from quantgate.quality.golden import GoldenSet
from quantgate.quality.rendering import Rendering
from quantgate.quality.scoring import scorers_sha256

LOCK_NAME = "golden.lock.json"
SCHEMA_VERSION = 1

_WHAT = {
    "items_sha256": "the items",
    "task_sha256": "the task",
    "scorers_sha256": "the scorers",
    "tokenizer_sha256": "the tokenizer",
    "chat_template_sha256": "the chat template",
    "prompts_sha256": "the rendered prompts",
}


def make_lock(golden: GoldenSet, rendering: Rendering, *, model: str) -> dict[str, Any]:
    """The lock of a set as it is now, rendered with one model's tokenizer."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": golden.name,
        "num_items": len(golden.items),
        "tags": golden.tag_counts(),
        "items": {i.id: sha256_of_json(i.canonical())[:16] for i in golden.items},
        "items_sha256": golden.items_sha256,
        "task_sha256": golden.task_sha256,
        "scorers_sha256": scorers_sha256(golden.task),
        "rendered_for": model,
        **asdict(rendering),
        "metadata": golden.task.metadata,
    }


def write_lock(golden: GoldenSet, rendering: Rendering, *, model: str) -> Path:
    path = golden.folder / LOCK_NAME
    write_json(path, make_lock(golden, rendering, model=model))
    return path


def read_lock(folder: Path) -> Mapping[str, Any]:
    """Reads a lock.

    Raises:
        GoldenSetError: missing, or not a lock.
    """
    path = folder / LOCK_NAME
    try:
        lock = read_json(path)
    except FileNotFoundError as error:
        raise GoldenSetError(
            f"{path}: missing; a set must be locked before it can judge. "
            f"Write: quantgate golden lock {folder} --model MODEL."
        ) from error
    except ValueError as error:
        raise GoldenSetError(f"{path}: not JSON ({error}).") from error
    if not isinstance(lock, dict) or lock.get("schema_version") != SCHEMA_VERSION:
        raise GoldenSetError(f"{path}: expected schema_version {SCHEMA_VERSION}.")
    return lock


def lock_sha256(folder: Path) -> str:
    return sha256_of_json(read_lock(folder))


def changes_since_lock(
    golden: GoldenSet, rendering: Rendering, lock: Mapping[str, Any]
) -> list[str]:
    """What differs from the lock, in words; empty when the set is unchanged."""
    now = {
        "items_sha256": golden.items_sha256,
        "task_sha256": golden.task_sha256,
        "scorers_sha256": scorers_sha256(golden.task),
        **asdict(rendering),
    }
    changed = [what for key, what in _WHAT.items() if lock.get(key) != now[key]]
    if changed and changed[0] == _WHAT["items_sha256"]:
        locked: Mapping[str, str] = lock.get("items", {})
        found = {i.id: sha256_of_json(i.canonical())[:16] for i in golden.items}
        ids = sorted(i for i in locked.keys() | found.keys() if locked.get(i) != found.get(i))
        changed[0] = f"the items ({len(ids)} differ: {', '.join(ids[:3])})"
    return changed
