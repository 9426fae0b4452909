"""What the server counts, and how Prometheus reads it.

Counts are plain numbers that the engine thread updates (an observation costs a bisection, no lock);
a collector turns them into metric families on a scrape. Suffixes, types and buckets follow vLLM.
"""

import resource
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

PREFIX = "quantgate_"
_WAIT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_STEP_S = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_E2E_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)


class Histogram:
    """Bucket counts and a sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class Metrics:
    """All counts of one server, and its registry."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.num_running = 0
        self.num_waiting = 0
        self.queued_tokens = 0
        self.kv_usage = 0.0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0
        self.oom = 0
        self.oom_retry = 0
        self.step_errors = 0
        self.finished: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self.queue_time_s = Histogram(_WAIT_S)
        self.ttft_s = Histogram(_WAIT_S)
        self.inter_token_s = Histogram(_STEP_S)
        self.e2e_s = Histogram(_E2E_S)
        self.prefill_s = Histogram(_WAIT_S)
        self.decode_s = Histogram(_E2E_S)
        self.tokenize_s = Histogram(_WAIT_S)
        self.step_s = Histogram(_STEP_S)
        self.step_tokens = Histogram(_COUNTS)
        self.batch_size = Histogram(_COUNTS)
        self.weight_bytes = 0
        self.kv_bytes = 0
        self.peak_memory_bytes: Callable[[], int] = peak_resident_bytes
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", self.num_running),
            ("num_requests_waiting", "Requests in the queue.", self.num_waiting),
            (
                "queued_tokens",
                "Prompt and output tokens asked for in the queue.",
                self.queued_tokens,
            ),
            ("kv_cache_usage_perc", "Used KV pages, 1 is all.", self.kv_usage),
            ("peak_memory_bytes", "Most memory held since the start.", self.peak_memory_bytes()),
            ("weight_bytes", "Bytes of the loaded weights.", self.weight_bytes),
            ("kv_cache_bytes", "Bytes of the KV pages.", self.kv_bytes),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge

    def _counters(self) -> Iterator[Metric]:
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens computed or reused.", self.prompt_tokens),
            ("generation_tokens", "Tokens produced.", self.generation_tokens),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", self.prefix_queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", self.prefix_hits),
            ("num_preemptions", "Requests that gave up their pages.", self.preemptions),
            ("oom", "Steps that ran out of memory.", self.oom),
            ("oom_retry", "Steps repeated in halves after running out of memory.", self.oom_retry),
            ("step_errors", "Steps that failed for another reason.", self.step_errors),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        for name, text, label, counts in (
            ("request_success", "Ended requests.", "finished_reason", self.finished),
            ("admission_rejections", "Refused requests.", "reason", self.rejections),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name", label])
            for key, value in sorted(counts.items()):
                counter.add_metric([self._model_name, key], value)
            yield counter

    def _histograms(self) -> Iterator[Metric]:
        for name, text, histogram in (
            ("request_queue_time_seconds", "Arrival to first scheduling.", self.queue_time_s),
            ("time_to_first_token_seconds", "Arrival to first token.", self.ttft_s),
            ("inter_token_latency_seconds", "Time between tokens.", self.inter_token_s),
            ("e2e_request_latency_seconds", "Arrival to end.", self.e2e_s),
            ("request_prefill_time_seconds", "First scheduling to first token.", self.prefill_s),
            ("request_decode_time_seconds", "First token to end.", self.decode_s),
            ("tokenize_seconds", "Text to tokens.", self.tokenize_s),
            ("step_time_seconds", "Duration of a step.", self.step_s),
            ("iteration_tokens_total", "Tokens computed in a step.", self.step_tokens),
            ("batch_size", "Requests in a step.", self.batch_size),
        ):
            total = 0
            buckets = []
            for bound, count in zip(
                (*histogram.bounds, float("inf")), histogram.counts, strict=True
            ):
                total += count
                buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
            family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
            family.add_metric([self._model_name], buckets, histogram.sum)
            yield family


def peak_resident_bytes() -> int:
    """Most resident memory of this process (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_device_bytes(device: torch.device) -> int:
    """Most memory that torch has reserved on a CUDA device."""
    return int(torch.cuda.max_memory_reserved(device))
