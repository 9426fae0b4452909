"""What the server counts: plain numbers, updated without a lock by the one thread that owns them.

`EngineMetrics` belongs to the thread that steps the engine, `FrontMetrics` to the event loop. Both
pickle, so that a snapshot can travel; `families.py` says what each number is called outside.
None means that the thing counted does not exist here (no prefix cache, no CUDA): absent, never 0.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

# Fine enough to see an admission window of 5 to 50 ms; vLLM's first bucket is 300 ms.
WAIT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
STEP_S = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# vLLM's, and finer below its first: a p95 is only as exact as its bucket.
E2E_S = (
    *(0.01, 0.02, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5),
    *(2.0, 2.5, 3.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0),
)
TEXT_S = (0.00002, 0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
TOKENS = tuple(float(m * 10**e) for e in range(5) for m in (1, 2, 5))
RATIO = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(slots=True)
class Histogram:
    """Bucket counts and a sum. An observation is a bisection."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def add(self, other: "Histogram") -> None:
        """Count what `other` has counted, too."""
        self.counts = [mine + more for mine, more in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


_waits = partial(Histogram, WAIT_S)
_steps = partial(Histogram, STEP_S)
_lives = partial(Histogram, E2E_S)
_texts = partial(Histogram, TEXT_S)
_counts = partial(Histogram, COUNTS)
_tokens = partial(Histogram, TOKENS)
_ratios = partial(Histogram, RATIO)
REJECTIONS = ("queued_requests", "queued_tokens", "tenant_share", "deadline")


def _zeros(*labels: str) -> Callable[[], Counter[str]]:
    """A series that begins with its first event has no rate for it; one that begins at 0 has."""
    return lambda: Counter(dict.fromkeys(labels, 0))


@dataclass(slots=True)
class EngineGauges:
    """What the engine looks like at one moment."""

    num_running: int = 0
    num_waiting: dict[str, int] = field(default_factory=dict)  # by priority
    queued_tokens: int = 0
    # perf_counter_ns is one clock for all processes of a machine, so a reader can tell the age.
    oldest_arrived_ns: int | None = None
    # What the engine works off of a queue; None until requests have had to wait.
    service_tokens_per_s: float | None = None
    # How long a request takes from its first step to its end, per step.
    service_s_per_step: float | None = None
    kv_pages: int = 0
    kv_pages_used: int = 0
    # Held by the prefix cache alone: free for whoever needs them.
    kv_pages_cached: int = 0
    weight_bytes: int = 0
    # Linears by the kernel that computes them; and by kernel why it is slow here, if it is.
    kernel_linears: dict[str, int] = field(default_factory=dict)
    slow_kernels: dict[str, str] = field(default_factory=dict)
    kv_bytes: int = 0
    graph_bytes: int | None = None
    peak_memory_bytes: int = 0
    cuda_alloc_retries: int | None = None
    cuda_ooms: int | None = None
    # torch's name of the CUDA device, by which NVML finds it.
    device_uuid: str | None = None
    # What the device reached on a copy and on a matrix product when the engine started.
    device_bytes_per_s: float | None = None
    device_flops_per_s: float | None = None

    @property
    def slow_linears(self) -> int:
        return sum(self.kernel_linears[kernel] for kernel in self.slow_kernels)


@dataclass(slots=True)
class EngineMetrics:
    """Everything counted since the engine's start, and `now`. Each field but `now` only grows."""

    now: EngineGauges = field(default_factory=EngineGauges)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int | None = None
    prefix_hits: int | None = None
    cross_tenant_hits: int | None = None
    preemptions: int = 0
    aging_promotions: int = 0
    deadline_expired: Counter[str] = field(default_factory=_zeros("queued", "running"))  # by phase
    window_wait_s: Histogram = field(default_factory=_waits)
    # KV pages that decode steps read, and those of them that held tokens.
    gathered_pages: int = 0
    needed_pages: int = 0
    # Decode steps replayed from a CUDA graph, and those that could not be, by reason.
    graph_hits: int | None = None
    graph_misses: Counter[str] | None = None
    oom: int = 0
    oom_retry: int = 0
    step_errors: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # by reason
    queue_time_s: dict[str, Histogram] = field(default_factory=dict)  # by priority
    ttft_s: Histogram = field(default_factory=_waits)
    inter_token_s: Histogram = field(default_factory=_steps)
    e2e_s: Histogram = field(default_factory=_lives)
    prefill_s: Histogram = field(default_factory=_waits)
    decode_s: Histogram = field(default_factory=_lives)
    inference_s: Histogram = field(default_factory=_lives)
    request_prompt_tokens: Histogram = field(default_factory=_tokens)
    request_generation_tokens: Histogram = field(default_factory=_tokens)
    step_s: Histogram = field(default_factory=_steps)
    step_tokens: Histogram = field(default_factory=_counts)
    batch_size: Histogram = field(default_factory=_counts)
    batch_fill: Histogram = field(default_factory=_ratios)
    # Time with work, the model's part of it, and the least that the steps moved and computed.
    busy_s: float = 0.0
    model_s: float = 0.0
    work_bytes: int | None = None
    work_flops: int | None = None

    def observe_wait(self, priority: str, seconds: float) -> None:
        """A request of `priority` was scheduled for the first time."""
        histogram = self.queue_time_s.get(priority)
        if histogram is None:
            histogram = self.queue_time_s[priority] = Histogram(WAIT_S)
        histogram.observe(seconds)

    def add(self, other: "EngineMetrics") -> None:
        """Count what `other`, an earlier engine of this server, has counted; `now` stays."""
        for item in fields(self):
            if item.name != "now":
                mine, more = getattr(self, item.name), getattr(other, item.name)
                setattr(self, item.name, _sum(mine, more))


@dataclass(slots=True)
class FrontMetrics:
    """What happens to requests outside the engine."""

    engine_restarts: int = 0
    # What the served variant measured when it was promoted, by metric (slo in serving.yaml).
    slo_baselines: dict[str, float] = field(default_factory=dict)
    rejections: Counter[str] = field(default_factory=_zeros(*REJECTIONS))  # by reason
    # Deadlines that passed while no engine was warm.
    expired: int = 0
    tokenize_s: Histogram = field(default_factory=_texts)
    detokenize_s: Histogram = field(default_factory=_texts)
    # Requests that joined one like them under way, None where that is off; then by cache,
    # response or embedding, those that are on.
    coalesced_requests: int | None = None
    cache_queries: Counter[str] = field(default_factory=Counter)
    cache_hits: Counter[str] = field(default_factory=Counter)


def _sum(mine: Any, more: Any) -> Any:
    if mine is None or more is None:
        return more if mine is None else mine
    if isinstance(mine, Histogram):
        mine.add(more)
        return mine
    if isinstance(mine, Counter):
        mine.update(more)
        return mine
    if isinstance(mine, dict):
        return {
            key: _sum(mine.get(key), more.get(key)) for key in sorted(mine.keys() | more.keys())
        }
    return mine + more
