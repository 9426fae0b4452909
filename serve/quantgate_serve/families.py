"""Every metric of the server: its layer, type, name and meaning, and where its value comes from.

One table for the scrape, the dashboards, the alert rules' check and the documentation. Suffixes
and types are vLLM's where vLLM has the metric.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from quantgate_serve.metrics import EngineGauges, EngineMetrics, FrontMetrics, Histogram

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

    @property
    def now(self) -> EngineGauges:
        return self.engine.now


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


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


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
    Family("counter", "deadline_expired_total", lambda s: s.engine.deadline_expired,
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
    Family("histogram", "request_prefill_time_seconds", lambda s: s.engine.prefill_s,
           text="First scheduling to first token.", in_vllm=True),
    Family("histogram", "request_decode_time_seconds", lambda s: s.engine.decode_s,
           text="First token to end.", in_vllm=True),
    Family("histogram", "request_inference_time_seconds", lambda s: s.engine.inference_s,
           text="First scheduling to end.", in_vllm=True),
    Family("histogram", "tokenize_seconds", lambda s: s.front.tokenize_s,
           text="Text to tokens, with the wait for the tokeniser."),
)

DEVICE = (
    Family("histogram", "step_time_seconds", lambda s: s.engine.step_s,
           text="Duration of a step."),
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
           text="Allocations that torch repeated after emptying its cache. CUDA only."),
    Family("counter", "cuda_ooms_total", lambda s: s.now.cuda_ooms,
           text="Allocations that torch gave up. CUDA only."),
)
# fmt: on

LAYERS: dict[str, tuple[Family, ...]] = {"queue": QUEUE, "serving": SERVING, "device": DEVICE}
FAMILIES = (*QUEUE, *SERVING, *DEVICE)
