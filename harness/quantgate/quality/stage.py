"""The quality stage of one model: serve it, ask it every golden item, keep the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

from quantgate.errors import MeasurementError, QuantgateError
from quantgate.files import read_json, sha256_of_file, sha256_of_json, write_json
from quantgate.machine import processor_of, versions_of
from quantgate.quality.answers import Answer, ask_golden_set
from quantgate.quality.completions import FULL_BATCHES, Batching
from quantgate.quality.early_stop import Asked, StopRule, ask_until_failed
from quantgate.quality.golden import GoldenSet
from quantgate.quality.lock import changes_since_lock, read_lock
from quantgate.quality.rendering import RenderedPrompt, Renderer
from quantgate.quality.results import EarlyStop, count_errors, read_stop, write_results
from quantgate.server import Server
from quantgate.server_pool import ServerPool

# What computes logits beside the server's own code.
_ENGINE_PACKAGES = ("torch", "transformers", "tokenizers", "bitsandbytes", "gptqmodel", "triton")
# Modules whose code decides what is stored of an answer, beside the scorers', which the lock holds.
_ROW_MODULES = (
    "answers.py",
    "completions.py",
    "rows.py",
    "validity.py",
    "repetition.py",
    "scripts.py",
)


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
    stopped: Mapping[str, EarlyStop] = field(default_factory=dict)
    """By golden set: where a sequential gate ended the asking."""


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
    stop_rules: Mapping[str, StopRule] | None = None,
) -> QualityResult:
    """Asks one model every golden set through the server, unless the store has the answers.

    A set with a rule in `stop_rules` is asked no further once the rule has failed. A set that
    cannot be asked is in `missing` with its reason; nothing is raised for it.
    """
    prompts: dict[str, list[RenderedPrompt]] = {}
    missing: dict[str, str] = {}
    renderer = Renderer(model.folder)
    paths: dict[str, Path] = {}
    rules = stop_rules or {}
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
        key = results_key(model, golden, servers, batching)
        path = store / f"{golden.name}-{key[:24]}.parquet"
        rule = rules.get(golden.name)
        if rule and not _is_answered(path) and _is_answered(_path_of_part(path, rule)):
            path = _path_of_part(path, rule)
        paths[golden.name] = path
    asked = [g for g in sets if g.name in paths and not _is_answered(paths[g.name])]
    for golden in sets:
        if golden not in asked:
            on_answers(len(golden.items))
    has_died = False
    written: set[str] = set()
    if asked:
        try:
            _ask(
                model, asked, prompts, paths, written, rules, log=log, servers=servers,
                timeout_s=timeout_s, on_answers=on_answers, batching=batching,
            )  # fmt: skip
        except MeasurementError as error:
            has_died = True
            missing |= {g.name: str(error) for g in asked if g.name not in written}
    items = {name: path for name, path in paths.items() if name not in missing}
    facts = [read_json(_sidecar(path)) for path in items.values()]
    return QualityResult(
        items=items,
        missing=missing,
        oom_count=None if has_died else sum(int(f["oom_count"]) for f in facts),
        peak_bytes=max((int(f["peak_bytes"]) for f in facts), default=0),
        num_reused=len(paths) - len(asked),
        stopped={name: stop for name, path in items.items() if (stop := read_stop(path))},
    )


def join_results(results: Sequence[QualityResult]) -> QualityResult:
    """What several calls of `measure_quality` found of one model, each asked other sets."""
    counts = [result.oom_count for result in results]
    known = [count for count in counts if count is not None]
    return QualityResult(
        items={name: path for one in results for name, path in one.items.items()},
        missing={name: why for one in results for name, why in one.missing.items()},
        oom_count=None if len(known) < len(counts) else sum(known),
        peak_bytes=max((one.peak_bytes for one in results), default=0),
        num_reused=sum(one.num_reused for one in results),
        stopped={name: stop for one in results for name, stop in one.stopped.items()},
    )


def _ask(
    model: ServedModel,
    sets: Sequence[GoldenSet],
    prompts: Mapping[str, list[RenderedPrompt]],
    paths: dict[str, Path],
    written: set[str],
    rules: Mapping[str, StopRule],
    *,
    log: Path,
    servers: ServerPool,
    timeout_s: float,
    on_answers: Callable[[int], None],
    batching: Batching,
) -> None:
    """Asks the sets and writes their results, whose names go into `written`.

    A part has a path of its own, put into `paths`.
    """
    with servers.serving(model.folder, log=log) as server:
        for golden in sets:
            before = server.oom_count()
            rule = rules.get(golden.name)
            asked = _ask_set(
                server, golden, prompts[golden.name], rule, timeout_s=timeout_s,
                on_answers=on_answers, batching=batching,
            )  # fmt: skip
            # A server that died answers nothing: those are not the variant's answers.
            facts = {
                "model": model.name,
                "oom_count": server.oom_count() - before,
                "peak_bytes": server.peak_bytes(),
            }
            path = paths[golden.name]
            if rule and asked.stop:
                path = paths[golden.name] = _path_of_part(path, rule)
            write_results(path, asked.part, asked.answers, stop=asked.stop)
            write_json(_sidecar(path), facts)
            written.add(golden.name)


def _ask_set(
    server: Server,
    golden: GoldenSet,
    prompts: Sequence[RenderedPrompt],
    rule: StopRule | None,
    *,
    timeout_s: float,
    on_answers: Callable[[int], None],
    batching: Batching,
) -> Asked:
    def ask(positions: Sequence[int]) -> list[Answer]:
        some = [prompts[at] for at in positions]
        return ask_golden_set(
            server.url, golden, some, timeout_s=timeout_s, on_answers=on_answers, batching=batching
        )

    if rule is None:
        return Asked(part=golden, answers=ask(range(len(prompts))))
    asked = ask_until_failed(golden, rule, ask)
    # The steps of those that are not asked are done too.
    on_answers(len(golden.items) - len(asked.answers))
    return asked


def results_key(
    model: ServedModel, golden: GoldenSet, servers: ServerPool, batching: Batching
) -> str:
    """Results are found by what they depend on, never by a name.

    How the server batches is part of it: rows of one batch share a matrix product, whose rounding
    depends on their number, and LLM.int8 looks for outliers in the whole batch.
    """
    return sha256_of_json(
        {
            "artifact": model.artifact_sha256,
            # Holds the items, the sampling settings, the scorers and the rendered prompts.
            "lock": dict(read_lock(golden.folder)),
            "rows": [sha256_of_file(Path(__file__).with_name(name)) for name in _ROW_MODULES],
            "engine": engine_sha256(),
            "processor": processor_of(servers.options.device),
            "server": servers.options.arguments(),
            "batching": asdict(batching),
        }
    )


@cache
def engine_sha256() -> str:
    """The version of the engine: the digest of its code, and the packages it computes with."""
    files = digest_code(Path(str(resources.files("quantgate_serve"))))
    return sha256_of_json({"files": files, "packages": versions_of(_ENGINE_PACKAGES)})


def digest_code(root: Path) -> dict[str, str]:
    """Every file under a package by its digest, in whatever language; not what Python compiled."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(root).as_posix(): sha256_of_file(path) for path in files}


def _path_of_part(path: Path, rule: StopRule) -> Path:
    """All items serve everybody; a part only whoever would stop at the same place."""
    return path.with_stem(f"{path.stem}-{rule.sha256[:12]}")


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _is_answered(path: Path) -> bool:
    """Whether a file holds an answer to every item; what a busy machine cost is asked again."""
    # The sidecar is written last, so a parquet without one belongs to an interrupted run.
    return path.is_file() and _sidecar(path).is_file() and not count_errors(path)[0]
