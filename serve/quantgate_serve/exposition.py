"""Answers a scrape: the table of families, read from the counts, in Prometheus' text format.

Reads plain numbers that others update, takes none of their locks, and so never holds up a step.
A number may be one observation older than its neighbour.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from threading import Lock
from time import perf_counter_ns
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from quantgate_serve.families import FAMILIES, PREFIX, Family, RecentWork, Sample, Scene, Value
from quantgate_serve.metrics import WAIT_S, EngineMetrics, FrontMetrics, Histogram
from quantgate_serve.nvml import Gpu, GpuReading, open_gpu

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
VLLM_PREFIX = "vllm:"
# Ratios that cannot be averaged later (host gap, MBU, MFU) look back this far.
_RECENT_NS = 60_000_000_000
_KINDS: dict[str, Any] = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "histogram": HistogramMetricFamily,
}


class Exposition:
    """Renders one server's metrics; `also_vllm` adds those that vLLM has under vLLM's names."""

    def __init__(
        self,
        model_name: str,
        engine: Callable[[], EngineMetrics],
        front: FrontMetrics,
        *,
        also_vllm: bool = False,
    ) -> None:
        self._model_name = model_name
        self._engine = engine
        self._front = front
        self._also_vllm = also_vllm
        self._gpu: Gpu | None = None
        self._gpu_uuid: str | None = None
        # What earlier scrapes saw, the oldest first; a server starts with nothing done.
        self._seen = deque([(perf_counter_ns(), RecentWork(0.0, 0.0, None, None))])
        # Two scrapes at once would share the device's samples.
        self._lock = Lock()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        with self._lock:
            return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not count as a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for each scrape."""
        engine, now_ns = self._engine(), perf_counter_ns()
        scene = Scene(
            engine, self._front, now_ns, self._recent_work(engine, now_ns), self._read_gpu(engine)
        )
        for family in FAMILIES:
            series = _series(family.read(scene))
            if series is None:
                continue
            labels = {"model_name": self._model_name}
            yield _metric(PREFIX, family, series, labels, label=family.label)
            if self._also_vllm and family.in_vllm:
                yield self._as_vllm(family, series)

    def _recent_work(self, engine: EngineMetrics, now_ns: int) -> RecentWork:
        """What was done since the oldest scrape of the last minute, or else since the last one."""
        seen = self._seen
        while len(seen) > 1 and now_ns - seen[0][0] > _RECENT_NS:
            seen.popleft()
        done = RecentWork(engine.busy_s, engine.model_s, engine.work_bytes, engine.work_flops)
        before = seen[0][1]
        seen.append((now_ns, done))
        return RecentWork(
            done.busy_s - before.busy_s,
            done.model_s - before.model_s,
            None if done.num_bytes is None else done.num_bytes - (before.num_bytes or 0),
            None if done.num_flops is None else done.num_flops - (before.num_flops or 0),
        )

    def _read_gpu(self, engine: EngineMetrics) -> GpuReading:
        if engine.now.device_uuid != self._gpu_uuid:
            self._gpu_uuid = engine.now.device_uuid
            self._gpu = open_gpu(self._gpu_uuid)
        return GpuReading() if self._gpu is None else self._gpu.read()

    def _as_vllm(self, family: Family, series: Mapping[str, Sample]) -> Metric:
        labels = {"model_name": self._model_name, "engine": "0"}
        if family.label == "priority":
            # vLLM has one queue.
            return _metric(VLLM_PREFIX, family, {"": _total(family, series)}, labels, label=None)
        return _metric(VLLM_PREFIX, family, series, labels, label=family.label)


def _series(value: Value) -> dict[str, Sample] | None:
    """Each label's sample, "" where there is no label."""
    if value is None:
        return None
    # Copied whole: the owner may add a label at any moment.
    return dict(value) if isinstance(value, Mapping) else {"": value}


def _total(family: Family, series: Mapping[str, Sample]) -> Sample:
    if family.kind != "histogram":
        return sum(value for value in series.values() if not isinstance(value, Histogram))
    total = Histogram(WAIT_S)
    for histogram in series.values():
        if isinstance(histogram, Histogram):
            total.add(histogram)
    return total


def _metric(
    prefix: str,
    family: Family,
    series: Mapping[str, Sample],
    labels: Mapping[str, str],
    *,
    label: str | None,
) -> Metric:
    metric: Metric = _KINDS[family.kind](
        prefix + family.name, family.text, labels=[*labels, *([] if label is None else [label])]
    )
    add_metric = metric.add_metric  # type: ignore[attr-defined]
    for key, sample in sorted(series.items()):
        values = [*labels.values(), *([] if label is None else [key])]
        if isinstance(sample, Histogram):
            add_metric(values, *_buckets(sample))
        else:
            add_metric(values, sample)
    return metric


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Prometheus' cumulative buckets, and the sum."""
    bounds = [str(bound) for bound in histogram.bounds] + ["+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True)), histogram.sum
