"""Scoring outputs against targets with `evaluate`, by local metric modules (no hub)."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from quantgate.files import sha256_of_file, sha256_of_json
from quantgate.quality.task import Task
from quantgate_serve.imports import without


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """Where a scorer's code is: its script, and what else decides a score."""

    script: str
    modules: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


_ROUGE = _Module(script="rouge", modules=("words.py",), packages=("rouge-score",))
_MODULES: Mapping[str, _Module] = {
    "exact_match": _Module(script="exact_match"),
    "exact_text": _Module(script="exact_text"),
    "json_fields": _Module(script="json_fields"),
    "token_f1": _Module(script="token_f1"),
    "rouge1": _ROUGE,
    "rouge2": _ROUGE,
    "rougeL": _ROUGE,
}

# `evaluate` keeps its modules' state in process-wide caches.
_ONE_AT_A_TIME = threading.Lock()

# Scorers whose every score is 0 or 1: compared as paired proportions.
BINARY_SCORERS = frozenset({"exact_match", "exact_text"})


def score_items(scorer: str, outputs: Sequence[str], targets: Sequence[str]) -> list[float]:
    """The score of each item, 0 to 1, in the order given."""
    if not outputs:
        return []
    with _ONE_AT_A_TIME:
        result: dict[str, Any] = _load(scorer).compute(predictions=outputs, references=targets)
    return [float(score) for score in result["scores"]]


def scorers_sha256(task: Task) -> str:
    """The version of the scorers a task uses: the digest of their code."""
    return sha256_of_json(
        {spec.metric: _digest(_MODULES[spec.metric]) for spec in task.metric_list}
    )


def _digest(module: _Module) -> object:
    script = sha256_of_file(_script(module))
    if not module.modules and not module.packages:
        return script
    return {
        "script": script,
        "modules": [sha256_of_file(_root() / name) for name in module.modules],
        "packages": {name: importlib.metadata.version(name) for name in module.packages},
    }


@cache
def _load(scorer: str) -> Any:
    # evaluate looks for the pipelines of transformers, and with them come torch's quantizers:
    # seconds, memory, and warnings on the user's screen, for an evaluator that is not used here.
    with without("transformers.pipelines"):
        import evaluate

    script = _script(_MODULES[scorer])
    return evaluate.load(str(script), config_name=scorer, keep_in_memory=True)


def _script(module: _Module) -> Path:
    return _root() / "metrics" / module.script / f"{module.script}.py"


def _root() -> Path:
    return Path(str(resources.files("quantgate.quality")))
