"""The quality stage of one model: serve it, ask it every golden item, keep the results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from quantgate.errors import MeasurementError, QuantgateError
from quantgate.files import read_json, sha256_of_file, sha256_of_json, write_json
from quantgate.quality.answers import ask_golden_set
from quantgate.quality.completions import FULL_BATCHES, Batching
from quantgate.quality.golden import GoldenSet
from quantgate.quality.lock import changes_since_lock, read_lock
from quantgate.quality.rendering import RenderedPrompt, Renderer
from quantgate.quality.results import write_results
from quantgate.server_pool import ServerPool

# `evaluate` keeps its modules' state in process-wide caches.
_SCORING = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model folder to ask: the reference or a variant."""

    name: str
    folder: Path
    artifact_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityResult:
    """Where a model's per-item results lie, and why some are missing."""

    items: Mapping[str, Path]
    """Parquet by golden set."""
    missing: Mapping[str, str]
    """Reason by golden set."""
    oom_count: int | None
    """Out-of-memory events of the server while asked; None when it died."""
    peak_bytes: int
    """Most memory the server held by the end of a set; 0 when none was asked."""
    num_reused: int


def measure_quality(
    model: ServedModel,
    sets: Sequence[GoldenSet],
    *,
    store: Path,
    log: Path,
    servers: ServerPool,
    timeout_s: float,
    on_answers: Callable[[int], None],
    batching: Batching = FULL_BATCHES,
) -> QualityResult:
    """Asks one model every golden set through the server, unless the store has the answers.

    A set that cannot be asked is in `missing` with its reason; nothing is raised for it.
    """
    prompts: dict[str, list[RenderedPrompt]] = {}
    missing: dict[str, str] = {}
    renderer = Renderer(model.folder)
    paths: dict[str, Path] = {}
    for golden in sets:
        try:
            rendered = renderer.render(golden)
            changes = changes_since_lock(
                golden, renderer.describe(golden, rendered), read_lock(golden.folder)
            )
        except QuantgateError as error:
            missing[golden.name] = str(error)
            continue
        if changes:
            missing[golden.name] = (
                f"differs from its lock in {', '.join(changes)}, as {model.name} renders it. "
                "Restore it, or lock it again if the change was agreed on."
            )
            continue
        prompts[golden.name] = rendered
        key = _key(model, golden, servers, batching)
        paths[golden.name] = store / f"{golden.name}-{key[:24]}.parquet"
    asked = [g for g in sets if g.name in paths and not _has_results(paths[g.name])]
    for golden in sets:
        if golden not in asked:
            on_answers(len(golden.items))
    has_died = False
    if asked:
        try:
            _ask(
                model, asked, prompts, paths, log=log, servers=servers, timeout_s=timeout_s,
                on_answers=on_answers, batching=batching,
            )  # fmt: skip
        except MeasurementError as error:
            has_died = True
            missing |= {g.name: str(error) for g in asked if not _has_results(paths[g.name])}
    items = {name: path for name, path in paths.items() if name not in missing}
    facts = [read_json(_sidecar(path)) for path in items.values()]
    return QualityResult(
        items=items,
        missing=missing,
        oom_count=None if has_died else sum(int(f["oom_count"]) for f in facts),
        peak_bytes=max((int(f["peak_bytes"]) for f in facts), default=0),
        num_reused=len(paths) - len(asked),
    )


def _ask(
    model: ServedModel,
    sets: Sequence[GoldenSet],
    prompts: Mapping[str, list[RenderedPrompt]],
    paths: Mapping[str, Path],
    *,
    log: Path,
    servers: ServerPool,
    timeout_s: float,
    on_answers: Callable[[int], None],
    batching: Batching,
) -> None:
    with servers.serving(model.folder, log=log) as server:
        for golden in sets:
            before = server.oom_count()
            answers = ask_golden_set(
                server.url, golden, prompts[golden.name], timeout_s=timeout_s,
                on_answers=on_answers, batching=batching,
            )  # fmt: skip
            # A server that died answers nothing: those are not the variant's answers.
            facts = {
                "model": model.name,
                "oom_count": server.oom_count() - before,
                "peak_bytes": server.peak_bytes(),
            }
            with _SCORING:
                write_results(paths[golden.name], golden, answers)
            write_json(_sidecar(paths[golden.name]), facts)


def _key(model: ServedModel, golden: GoldenSet, servers: ServerPool, batching: Batching) -> str:
    """Results are found by what they depend on, never by a name."""
    return sha256_of_json(
        {
            "artifact": model.artifact_sha256,
            "lock": dict(read_lock(golden.folder)),
            "engine": engine_sha256(),
            "server": servers.options.arguments(),
            "batching": asdict(batching),
        }
    )


@cache
def engine_sha256() -> str:
    """The version of the engine: the digest of its code."""
    root = Path(str(resources.files("quantgate_serve")))
    files = {p.relative_to(root).as_posix(): sha256_of_file(p) for p in root.rglob("*.py")}
    return sha256_of_json(files)


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _has_results(path: Path) -> bool:
    # The sidecar is written last, so a parquet without one belongs to an interrupted run.
    return path.is_file() and _sidecar(path).is_file()
