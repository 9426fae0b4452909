"""The compute floor: the time that the model's Linears alone would take for a workload.

Prompt tokens count at the best GEMM rate that this machine reaches, decode steps at the time of all
Linears for the mean batch of the real run. Both are measured for each way of multiplying that torch
has on this CPU and for the engine's own, and the fastest of all repetitions counts. The engine's
time, though, is all of its run, whatever other guests of the host do; so the floor with decode
steps at their median is told beside it.

Attention also reads every earlier key and value in each step, which the floor leaves out. What that
takes at least is measured beside it: as many bytes, in order, from memory that no cache holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from serving_workload import BenchRequest
from torch import Tensor, nn
from torch.nn import functional

from quantgate_serve import huge_pages
from quantgate_serve.native.layer import find_kernels
from quantgate_serve.native.linear import NativeLinear, can_multiply

_LARGE_ROWS = (256, 512, 1024)
_SQUARE = 2048
_DURATION_S = 0.3
# Several times the last-level cache of a server's CPU, of which others use a part.
_COLD_BYTES = 256 * 2**20

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Floor:
    """The floor of one workload, and what it was computed from."""

    duration_s: float
    # With decode steps at their median instead of the fastest.
    typical_s: float
    gemm_flop_per_s: float
    mean_batch: float
    decode_step_s: float
    typical_decode_step_s: float
    default_decode_step_s: float


@dataclass(frozen=True, slots=True)
class Times:
    """Of one thing done again and again, in seconds."""

    best: float
    median: float


class Linears:
    """Every Linear of a model, in each implementation that torch has here, and in ours."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [
            module.weight.detach()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        ]
        self.head = model.get_submodule("lm_head").weight.detach()

    @property
    def flop_per_token(self) -> int:
        """Of a prompt token, whose logits nobody reads."""
        return 2 * sum(weight.numel() for weight in self.layers)

    def step_s(self, rows: int, *, with_head: bool) -> dict[str, float]:
        """The least seconds for all Linears over `rows` tokens, by implementation."""
        return {name: times.best for name, times in self.times(rows, with_head=with_head).items()}

    def times(self, rows: int, *, with_head: bool) -> dict[str, Times]:
        """For all Linears over `rows` tokens, by implementation."""
        weights = [*self.layers, self.head] if with_head else self.layers
        inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}
        result = {}
        for name, prepare in implementations().items():
            calls = [(prepare(weight), inputs[weight.shape[1]]) for weight in weights]
            result[name] = _times(lambda calls=calls: [call(x) for call, x in calls])
        return result


def has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )


@torch.inference_mode()
def measure_floor(
    linears: Linears, requests: Sequence[BenchRequest], *, mean_batch: float, gemm: float
) -> Floor:
    """The floor for `requests`; the first output token of each comes out of its prompt's step."""
    prompt_tokens = sum(len(request.prompt) for request in requests)
    decode_tokens = sum(request.num_output - 1 for request in requests)
    head_flop = 2 * linears.head.numel() * len(requests)
    step = linears.times(max(1, round(mean_batch)), with_head=True)
    fastest = min(times.best for times in step.values())
    typical = min(times.median for times in step.values())
    prompt_s = (prompt_tokens * linears.flop_per_token + head_flop) / gemm
    return Floor(
        duration_s=prompt_s + decode_tokens / mean_batch * fastest,
        typical_s=prompt_s + decode_tokens / mean_batch * typical,
        gemm_flop_per_s=gemm,
        mean_batch=mean_batch,
        decode_step_s=fastest,
        typical_decode_step_s=typical,
        default_decode_step_s=step["linear"].best,
    )


@torch.inference_mode()
def best_gemm_rate(linears: Linears) -> float:
    """FLOP/s: the best over the model's own shapes with many rows, and over a square product."""
    rates = [
        rows * linears.flop_per_token / seconds
        for rows in _LARGE_ROWS
        for seconds in linears.step_s(rows, with_head=False).values()
    ]
    square = torch.randn(_SQUARE, _SQUARE)
    for prepare in implementations().values():
        call = prepare(torch.randn(_SQUARE, _SQUARE))
        rates.append(2 * _SQUARE**3 / _times(lambda call=call: call(square)).best)
    return max(rates)


def kv_bytes(requests: Sequence[BenchRequest], *, bytes_per_token: int) -> int:
    """What the decode steps of `requests` read: each token all those before it, and itself."""
    return bytes_per_token * sum(
        len(request.prompt) + position + 1
        for request in requests
        for position in range(request.num_output - 1)
    )


@torch.inference_mode()
def cold_bytes_per_s() -> float:
    """How fast all threads read memory in order: at best what attention over a KV cache can reach.

    In huge pages, as the engine keeps its cache.
    """
    buffer = huge_pages.zeros((_COLD_BYTES // torch.float32.itemsize,), torch.float32)
    return _COLD_BYTES / _times(lambda: torch.dot(buffer, buffer)).best


def _linear(weight: Tensor) -> Multiply:
    return lambda x: functional.linear(x, weight)


def _transposed(weight: Tensor) -> Multiply:
    turned = weight.t().contiguous()
    return lambda x: torch.mm(x, turned)


def _onednn(weight: Tensor) -> Multiply:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.clone(), 64)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def implementations() -> dict[str, Callable[[Tensor], Multiply]]:
    """The ways of multiplying by a weight that there are here; each packs the weight once."""
    found: dict[str, Callable[[Tensor], Multiply]] = {
        "linear": _linear,
        "transposed": _transposed,
    }
    if has_onednn():
        found["onednn"] = _onednn
    kernels = find_kernels()
    if kernels is not None and can_multiply(torch.zeros(kernels.lanes, 1), kernels):
        found["native"] = lambda weight: NativeLinear(weight, None, kernels).forward
    return found


def _times(call: Callable[[], object]) -> Times:
    """Of the calls that fit into a third of a second, after two to warm up."""
    call()
    call()
    found = []
    end = perf_counter() + _DURATION_S
    while not found or perf_counter() < end:
        started = perf_counter()
        call()
        found.append(perf_counter() - started)
    return Times(min(found), median(found))
