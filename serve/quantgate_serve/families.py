"""Every metric of the server: its layer, type, name and meaning, and where its value comes from.

One table for the scrape, the dashboards, the alert rules' check and the documentation. Suffixes
and types are vLLM's where vLLM has the metric.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

from quantgate_serve.metrics import EngineGauges, EngineMetrics, FrontMetrics, Histogram
from quantgate_serve.nvml import GpuReading

PREFIX = "quantgate_"

Kind = Literal["gauge", "counter", "histogram"]
Sample = float | Histogram
# None, or a label value that is missing: the thing does not exist here, so nothing is exported.
Value = Sample | Mapping[str, Sample] | None


@dataclass(frozen=True, slots=True)
class Scene:
    """What one scrape sees."""

    engine: EngineMetrics
    front: FrontMetrics
    now_ns: int
    recent: "RecentWork"
    gpu: GpuReading

    @property
    def now(self) -> EngineGauges:
        return self.engine.now


class RecentWork(NamedTuple):
    """What the engine's steps took and did lately."""

    busy_s: float
    model_s: float
    num_bytes: float | None
    num_flops: float | None


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `name` is as Prometheus stores it, without the prefix.

    `label` is the label beside `model_name`, if it has one. `in_vllm`: vLLM has it, too.
    """

    kind: Kind
    name: str
    read: Callable[[Scene], Value]
    _: KW_ONLY
    text: str
    label: str | None = None
    in_vllm: bool = False


def _expired(scene: Scene) -> Mapping[str, float]:
    """By phase; who waited for an engine was queued."""
    counted = dict(scene.engine.deadline_expired)
    return counted | {"queued": counted.get("queued", 0) + scene.front.expired}


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _host_gap(scene: Scene) -> float | None:
    share = _share(scene.recent.model_s, scene.recent.busy_s)
    return None if share is None else max(0.0, 1.0 - share)


def _bandwidth_used(scene: Scene) -> float | None:
    rate = _share(scene.recent.num_bytes, scene.recent.busy_s)
    return _share(rate, scene.now.device_bytes_per_s)


def _arithmetic_used(scene: Scene) -> float | None:
    rate = _share(scene.recent.num_flops, scene.recent.busy_s)
    return _share(rate, scene.now.device_flops_per_s)


def _kv_usage(scene: Scene) -> float | None:
    now = scene.now
    return _share(now.kv_pages_used - now.kv_pages_cached, now.kv_pages)


def _oldest_wait_s(scene: Scene) -> float:
    arrived_ns = scene.now.oldest_arrived_ns
    return 0.0 if arrived_ns is None else (scene.now_ns - arrived_ns) / 1e9


# A table: one metric in two lines.
# fmt: off
QUEUE = (
    Family("gauge", "num_requests_waiting", lambda s: s.now.num_waiting,
           text="Requests in the queue.", label="priority", in_vllm=True),
    Family("gauge", "queued_tokens", lambda s: s.now.queued_tokens,
           text="Prompt and output tokens asked for in the queue."),
    Family("gauge", "oldest_wait_seconds", _oldest_wait_s,
           text="Age of the oldest request in the queue; 0 when it is empty."),
    Family("histogram", "request_queue_time_seconds", lambda s: s.engine.queue_time_s,
           text="Arrival to first scheduling.", label="priority", in_vllm=True),
    Family("gauge", "service_tokens_per_second", lambda s: s.now.service_tokens_per_s,
           text="Tokens of cost worked off per second while requests wait."),
    Family("histogram", "window_wait_seconds", lambda s: s.engine.window_wait_s,
           text="How long the admission window held a request; those it held only."),
    Family("counter", "aging_promotions_total", lambda s: s.engine.aging_promotions,
           text="Requests that started before more urgent ones, their class being overdue."),
    Family("counter", "deadline_expired_total", _expired,
           text="Requests ended by their deadline.", label="phase"),
    Family("counter", "admission_rejections_total", lambda s: s.front.rejections,
           text="Requests refused at the door.", label="reason", in_vllm=True),
)

SERVING = (
    Family("gauge", "num_requests_running", lambda s: s.now.num_running,
           text="Requests in the batch.", in_vllm=True),
    Family("histogram", "batch_size", lambda s: s.engine.batch_size,
           text="Requests in a step."),
    Family("histogram", "batch_fill_ratio", lambda s: s.engine.batch_fill,
           text="Requests in a step over the most that one may hold."),
    Family("histogram", "iteration_tokens_total", lambda s: s.engine.step_tokens,
           text="Tokens computed in a step.", in_vllm=True),
    Family("gauge", "kv_cache_usage_perc", _kv_usage,
           text="KV pages that requests hold, 1 is all. What only the prefix cache holds is free.",
           in_vllm=True),
    Family("gauge", "kv_cache_cached_perc", lambda s: _share(s.now.kv_pages_cached, s.now.kv_pages),
           text="KV pages that only the prefix cache holds, 1 is all."),
    Family("counter", "prefix_cache_queries_total", lambda s: s.engine.prefix_queries,
           text="Tokens looked up in the prefix cache.", in_vllm=True),
    Family("counter", "prefix_cache_hits_total", lambda s: s.engine.prefix_hits,
           text="Tokens found in the prefix cache.", in_vllm=True),
    Family("counter", "answer_cache_queries_total", lambda s: s.front.cache_queries or None,
           text="Requests looked up in the response and embedding caches.", label="cache"),
    Family("counter", "answer_cache_hits_total", lambda s: s.front.cache_hits or None,
           text="Requests answered from the response and embedding caches.", label="cache"),
    Family("counter", "coalesced_requests_total", lambda s: s.front.coalesced_requests,
           text="Requests answered by one like them that was under way."),
    Family("counter", "cross_tenant_hits_total", lambda s: s.engine.cross_tenant_hits,
           text="Pages of one tenant found under another's root. Must be 0."),
    Family("counter", "gathered_kv_pages_total", lambda s: s.engine.gathered_pages,
           text="KV pages that decode steps read, padding included."),
    Family("counter", "needed_kv_pages_total", lambda s: s.engine.needed_pages,
           text="KV pages that decode steps had to read: the rest is padding."),
    Family("counter", "num_preemptions_total", lambda s: s.engine.preemptions,
           text="Requests that gave up their pages.", in_vllm=True),
    Family("counter", "prompt_tokens_total", lambda s: s.engine.prompt_tokens,
           text="Prompt tokens computed or reused.", in_vllm=True),
    Family("counter", "generation_tokens_total", lambda s: s.engine.generation_tokens,
           text="Tokens produced.", in_vllm=True),
    Family("counter", "request_success_total", lambda s: s.engine.finished,
           text="Ended requests.", label="finished_reason", in_vllm=True),
    Family("histogram", "request_prompt_tokens", lambda s: s.engine.request_prompt_tokens,
           text="Prompt tokens of a request that ended well.", in_vllm=True),
    Family("histogram", "request_generation_tokens", lambda s: s.engine.request_generation_tokens,
           text="Tokens produced for a request that ended well.", in_vllm=True),
    Family("histogram", "time_to_first_token_seconds", lambda s: s.engine.ttft_s,
           text="Arrival to first token.", in_vllm=True),
    Family("histogram", "inter_token_latency_seconds", lambda s: s.engine.inter_token_s,
           text="Time between two tokens of a request.", in_vllm=True),
    Family("histogram", "e2e_request_latency_seconds", lambda s: s.engine.e2e_s,
           text="Arrival to end.", in_vllm=True),
    Family("gauge", "slo_baseline", lambda s: s.front.slo_baselines or None,
           text="What the variant measured when it was promoted, in its metric's unit.",
           label="metric"),
    Family("histogram", "request_prefill_time_seconds", lambda s: s.engine.prefill_s,
           text="First scheduling to first token.", in_vllm=True),
    Family("histogram", "request_decode_time_seconds", lambda s: s.engine.decode_s,
           text="First token to end.", in_vllm=True),
    Family("histogram", "request_inference_time_seconds", lambda s: s.engine.inference_s,
           text="First scheduling to end.", in_vllm=True),
    Family("histogram", "tokenize_seconds", lambda s: s.front.tokenize_s,
           text="Text to tokens, with the wait for the tokeniser."),
    Family("histogram", "detokenize_seconds", lambda s: s.front.detokenize_s,
           text="Tokens to text, for one request that gets some in a step."),
)

DEVICE = (
    Family("histogram", "step_time_seconds", lambda s: s.engine.step_s,
           text="Duration of a step's computation."),
    Family("counter", "busy_seconds_total", lambda s: s.engine.busy_s,
           text="Time with work: steps, and the time between two of them."),
    Family("counter", "model_seconds_total", lambda s: s.engine.model_s,
           text="The model's part of it: CUDA events around its kernels, its calls on a CPU."),
    Family("gauge", "host_gap_ratio", _host_gap,
           text="Share of the time with work that the model did not take, over the last minute."),
    Family("counter", "work_bytes_total", lambda s: s.engine.work_bytes,
           text="Bytes that the steps had to move at least: weights as stored, keys and values."),
    Family("counter", "work_flops_total", lambda s: s.engine.work_flops,
           text="Operations that the steps had to compute; a multiply-add is two."),
    Family("gauge", "mbu_ratio", _bandwidth_used,
           text="work_bytes per second with work over device_bytes_per_second, last minute."),
    Family("gauge", "mfu_ratio", _arithmetic_used,
           text="work_flops per second with work over device_flops_per_second, last minute."),
    Family("gauge", "device_bytes_per_second", lambda s: s.now.device_bytes_per_s,
           text="What a copy reached at the start (read and written bytes)."),
    Family("gauge", "device_flops_per_second", lambda s: s.now.device_flops_per_s,
           text="What a matrix product in the model's arithmetic reached at the start."),
    Family("gauge", "peak_memory_bytes", lambda s: s.now.peak_memory_bytes,
           text="Most memory held so far: resident on the CPU, reserved by torch on CUDA."),
    Family("gauge", "weight_bytes", lambda s: s.now.weight_bytes,
           text="Bytes of the loaded weights."),
    Family("gauge", "kv_cache_bytes", lambda s: s.now.kv_bytes,
           text="Bytes of the KV pages."),
    Family("gauge", "linears", lambda s: s.now.kernel_linears,
           text="Linears of the model by the kernel that computes them.", label="kernel"),
    Family("gauge", "slow_linears", lambda s: s.now.slow_linears,
           text="Linears whose kernel is slow on this device; the log says why."),
    Family("counter", "cuda_graph_hits_total", lambda s: s.engine.graph_hits,
           text="Decode steps replayed from a CUDA graph. CUDA only."),
    Family("counter", "cuda_graph_misses_total", lambda s: s.engine.graph_misses,
           text="Decode steps that no graph could replay. CUDA only.", label="reason"),
    Family("gauge", "cuda_graph_bytes", lambda s: s.now.graph_bytes,
           text="Device memory that recording the graphs took. CUDA only."),
    Family("counter", "oom_total", lambda s: s.engine.oom,
           text="Steps that ran out of memory."),
    Family("counter", "oom_retry_total", lambda s: s.engine.oom_retry,
           text="Steps repeated in halves after running out of memory."),
    Family("counter", "step_errors_total", lambda s: s.engine.step_errors,
           text="Steps that failed for another reason."),
    Family("counter", "engine_restarts_total", lambda s: s.front.engine_restarts,
           text="Engines that ended by themselves and were started again."),
    Family("counter", "cuda_alloc_retries_total", lambda s: s.now.cuda_alloc_retries,
           text="Allocations that torch repeated after emptying its cache (CUDA)."),
    Family("counter", "cuda_ooms_total", lambda s: s.now.cuda_ooms,
           text="Allocations that torch gave up (CUDA)."),
    Family("gauge", "gpu_utilization_ratio", lambda s: s.gpu.utilization_ratio,
           text="Share of time in which any kernel ran (NVML); says nothing of how well."),
    Family("gauge", "gpu_memory_used_bytes", lambda s: s.gpu.memory_used_bytes,
           text="Device memory in use by all processes (NVML)."),
    Family("gauge", "gpu_memory_total_bytes", lambda s: s.gpu.memory_total_bytes,
           text="Device memory (NVML)."),
    Family("gauge", "gpu_power_watts", lambda s: s.gpu.power_watts,
           text="Power drawn (NVML)."),
    Family("gauge", "gpu_temperature_celsius", lambda s: s.gpu.temperature_celsius,
           text="Temperature of the chip (NVML)."),
    Family("gauge", "gpu_sm_clock_hertz", lambda s: s.gpu.sm_clock_hertz,
           text="Clock of the SMs (NVML)."),
    Family("gauge", "gpu_sm_active_ratio", lambda s: s.gpu.sm_active_ratio,
           text="SMs with work, since the last scrape (GPM, from Hopper on)."),
    Family("gauge", "gpu_sm_occupancy_ratio", lambda s: s.gpu.sm_occupancy_ratio,
           text="Warps active over the most there can be (GPM, from Hopper on)."),
    Family("gauge", "gpu_tensor_active_ratio", lambda s: s.gpu.tensor_active_ratio,
           text="Tensor cores with work (GPM, from Hopper on)."),
    Family("gauge", "gpu_dram_active_ratio", lambda s: s.gpu.dram_active_ratio,
           text="Memory bandwidth used over its peak (GPM, from Hopper on)."),
)
# fmt: on

LAYERS: dict[str, tuple[Family, ...]] = {"queue": QUEUE, "serving": SERVING, "device": DEVICE}
FAMILIES = (*QUEUE, *SERVING, *DEVICE)
