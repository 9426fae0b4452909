"""The layers that judge mutants, cheap to dear: audit, distribution, behaviour through the server.

Each takes models by key and returns their measurements; a model that cannot be measured has Missing
ones, so that absence is judged and not skipped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from quantgate.audit.report import missing_audit, read_report, reduce_audit
from quantgate.audit.stage import audit_variants
from quantgate.errors import MeasurementError
from quantgate.gate import Gate
from quantgate.measure import Measurement, Missing
from quantgate.plan import Plan
from quantgate.quality.distribution import Candidate, compare_with_reference
from quantgate.quality.distribution_results import METRICS, reduce_distribution
from quantgate.quality.rendering import Renderer
from quantgate.quality.results import missing_golden_set, reduce_golden_set
from quantgate.quality.stage import QualityResult, ServedModel, measure_quality
from quantgate.server_pool import ServerPool
from quantgate.units import SERVED_NOUNS, parse_metric
from quantgate.variants.build import Variant
from quantgate.variants.scheme import CALIBRATED_SCHEMES, DEFAULT_GROUP_SIZE

AUDIT, DISTRIBUTION, BEHAVIOUR = "audit", "distribution", "behaviour"
LAYERS = (AUDIT, DISTRIBUTION, BEHAVIOUR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model at one layer."""

    measurements: Sequence[Measurement]
    seconds: float


def layer_of(gate: Gate) -> str | None:
    """The layer that measures a gate's metric; None for speed, memory, stability, served = offline.

    A fault of the drill is planted into the server and into offline scoring alike.
    """
    name = parse_metric(gate.metric)
    if name.stem in SERVED_NOUNS:
        return None
    if name.section == "audit":
        return AUDIT
    if name.is_golden_set:
        return BEHAVIOUR
    return DISTRIBUTION if name.section == "quality" else None


def audit_layer(
    plan: Plan, models: Mapping[str, Variant], *, store: Path, log: Path
) -> dict[str, Measured]:
    """One child process for all models."""
    if not models:
        return {}
    result = audit_variants(plan.source, models, store=store, log=log, on_done=lambda _: None)
    measured = {}
    for key, variant in models.items():
        path = result.reports.get(key)
        if path is None:
            is_calibrated = variant.manifest.scheme in CALIBRATED_SCHEMES
            missing = missing_audit(is_calibrated, result.failures[key])
            measured[key] = Measured(measurements=missing, seconds=0.0)
        else:
            report = read_report(path)
            measured[key] = Measured(
                measurements=reduce_audit(report, source=path.name), seconds=report.seconds
            )
    return measured


def distribution_layer(
    plan: Plan,
    models: Mapping[str, Variant],
    *,
    reference: Path,
    folder: Path,
    on_done: Callable[[str], None],
) -> dict[str, Measured]:
    """One child process for all models, which loads the reference once; nothing without a set."""
    if not models or plan.documents is None or plan.policy.distribution is None:
        return {}
    max_tokens = plan.policy.distribution.max_tokens
    rendered = Renderer(reference).render(plan.documents)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {key: folder / f"{index}.parquet" for index, key in enumerate(models)}
    clock = _Clock()

    def done(key: str) -> None:
        clock.lap(key)
        on_done(key)

    failures = compare_with_reference(
        reference,
        {key: _candidate(plan, variant) for key, variant in models.items()},
        [document for document in rendered if min(len(document.ids), max_tokens) >= 2],
        out=paths,
        log=folder / "distribution.log",
        device=plan.device,
        dtype=plan.dtype,
        threads=plan.server.threads,
        max_tokens=max_tokens,
        max_context=plan.server.max_context,
        on_done=done,
    )
    measured = {}
    for key, path in paths.items():
        if key in failures:
            reason = "the model cannot be scored: " + failures[key].splitlines()[-1].strip()
            found: Sequence[Measurement] = [Missing(metric=m, reason=reason) for m in METRICS]
        else:
            found = reduce_distribution(path, source=path.name)
        measured[key] = Measured(measurements=found, seconds=clock.laps.get(key, 0.0))
    return measured


def _candidate(plan: Plan, variant: Variant) -> Candidate:
    spec = plan.policy.variants[variant.name]
    return Candidate(
        folder=variant.folder,
        scheme=spec.scheme,
        group_size=spec.group_size or DEFAULT_GROUP_SIZE,
    )


def ask(
    plan: Plan,
    model: ServedModel,
    *,
    store: Path,
    log: Path,
    options: Mapping[str, int],
    on_answers: Callable[[int], None],
) -> QualityResult:
    """Serves one model on its own and asks it every golden set."""
    server = replace(plan.server, **options)  # type: ignore[arg-type]
    with ServerPool(server, keeps_running=False) as servers:
        return measure_quality(
            model,
            plan.golden_sets,
            store=store,
            log=log,
            servers=servers,
            timeout_s=plan.timeout_s * 10,
            on_answers=on_answers,
        )


def reduce_behaviour(
    plan: Plan, reference: QualityResult, candidate: QualityResult
) -> list[Measurement]:
    """Pairs a model's answers with the reference's, set by set."""
    measured: list[Measurement] = []
    for golden in plan.golden_sets:
        name = golden.name
        reason = reference.missing.get(name) or candidate.missing.get(name)
        if reason:
            measured += missing_golden_set(golden, reason)
            continue
        try:
            measured += reduce_golden_set(
                golden, reference.items[name], candidate.items[name], source=f"{name}.parquet"
            )
        except MeasurementError as error:
            measured += missing_golden_set(golden, str(error))
    return measured


@contextmanager
def planted(fault: str | None, folder: Path) -> Iterator[None]:
    """Processes started inside the block have a fault planted in the model of `folder`."""
    if fault is None:
        yield
        return
    before = dict(os.environ)
    site = str(resources.files("quantgate") / "drill" / "planted")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (site, before.get("PYTHONPATH"))))
    os.environ["QUANTGATE_DRILL_FAULT"] = fault
    os.environ["QUANTGATE_DRILL_FOLDER"] = str(folder.resolve())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Clock:
    """Seconds from one mark to the next, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
