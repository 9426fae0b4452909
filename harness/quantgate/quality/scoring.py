"""Scoring outputs against targets with `evaluate`, by local metric modules (no hub)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from quantgate.files import sha256_of_file, sha256_of_json
from quantgate.quality.golden import Task

# Scorers whose every score is 0 or 1: compared as paired proportions.
BINARY_SCORERS = frozenset({"exact_match"})


def score_items(scorer: str, outputs: Sequence[str], targets: Sequence[str]) -> list[float]:
    """The score of each item, 0 to 1, in the order given."""
    if not outputs:
        return []
    result: dict[str, Any] = _load(scorer).compute(predictions=outputs, references=targets)
    return [float(score) for score in result["scores"]]


def scorers_sha256(task: Task) -> str:
    """The version of the scorers a task uses: the digest of their code."""
    scripts = {spec.metric: sha256_of_file(_script(spec.metric)) for spec in task.metric_list}
    return sha256_of_json(scripts)


@cache
def _load(scorer: str) -> Any:
    import evaluate

    return evaluate.load(str(_script(scorer)), keep_in_memory=True)


def _script(scorer: str) -> Path:
    root = Path(str(resources.files("quantgate.quality"))) / "metrics"
    return root / scorer / f"{scorer}.py"
