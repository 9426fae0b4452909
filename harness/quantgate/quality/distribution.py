"""KL, agreement and perplexity against the reference: runs the teacher, which compares them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.files import write_json
from quantgate.quality.rendering import RenderedPrompt
from quantgate.server import last_lines

_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model to compare; scheme and group size say what its healthy twin is."""

    folder: Path
    scheme: str
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What candidates are compared with, on which text, and how both are computed."""

    reference: Path
    documents: Sequence[RenderedPrompt]
    device: str
    dtype: str
    threads: int | None
    max_tokens: int
    """Per document."""
    max_context: int | None
    """As the server is told: what it would refuse is refused here."""


def compare_with_reference(
    comparison: Comparison,
    candidates: Mapping[str, Candidate],
    *,
    out: Mapping[str, Path],
    log: Path,
    on_done: Callable[[str], None],
) -> dict[str, str]:
    """Scores each candidate in a child process and writes its parquet to `out[name]`.

    A candidate that ends the process is left out and the others go on.

    Returns:
        Why there is no result, by candidate; empty when all were scored.
    """
    failures: dict[str, str] = {}
    pending = dict(candidates)

    def take_finished() -> None:
        for name in [name for name in pending if out[name].is_file()]:
            del pending[name]
            on_done(name)

    while pending:
        request = _request(comparison, pending, out)
        code = _run_teacher(request, log=log, take_finished=take_finished)
        if pending:
            # Candidates are taken in order, so the first without a result is the one that failed.
            name = next(iter(pending))
            del pending[name]
            failures[name] = f"teacher-forced scoring failed (exit {code}):\n{last_lines(log)}"
    return failures


def _request(
    comparison: Comparison, candidates: Mapping[str, Candidate], out: Mapping[str, Path]
) -> dict[str, Any]:
    """What teacher.py reads."""
    return {
        "reference": str(comparison.reference),
        "candidates": [
            {
                "name": name,
                "folder": str(candidate.folder),
                "scheme": candidate.scheme,
                "group_size": candidate.group_size,
                "out": str(out[name]),
            }
            for name, candidate in candidates.items()
        ],
        "documents": [
            {
                "id": d.item.cluster,
                "tags": sorted(d.item.tags),
                "ids": list(d.ids[: comparison.max_tokens]),
            }
            for d in comparison.documents
        ],
        "device": comparison.device,
        "dtype": comparison.dtype,
        "threads": comparison.threads,
        "max_context": comparison.max_context,
    }


def _run_teacher(request: dict[str, Any], *, log: Path, take_finished: Callable[[], None]) -> int:
    """The exit code of the child process; `take_finished` is called while it runs, and after."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantgate-") as temporary:
        path = Path(temporary) / "request.json"
        write_json(path, request)
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "quantgate.quality.teacher", str(path)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Threads that spin at a barrier starve each other where cores are shared.
                env={"GOMP_SPINCOUNT": "10000"} | os.environ,
            )
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                take_finished()
        finally:
            process.kill()
            code = process.wait()
    take_finished()
    return code
