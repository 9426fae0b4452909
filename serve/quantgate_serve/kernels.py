"""Which kernel computes each Linear: read from the loaded modules, logged at start, exported.

Nothing here chooses: libraries pick a kernel for the device they find, and may quietly pick a slow
one. A slow one is named with what to do about it.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantgate_serve.coded import CodedLinear
from quantgate_serve.fused_int8 import FusedInt8Linear
from quantgate_serve.linear import PackedLinear
from quantgate_serve.llm_int8 import Int8Linear
from quantgate_serve.native.linear import NativeLinear

_log = logging.getLogger(__name__)
_ONE_BY_ONE = "computes its weights anew in each step"


@dataclass(frozen=True, slots=True)
class Kernel:
    """`count` Linears of a model computed by `name`. `slow` says why that is slow here, if it is.

    `uncapturable` says why a CUDA graph cannot hold it, if it cannot.
    """

    name: str
    count: int = 1
    slow: str | None = None
    uncapturable: str | None = None


def read_kernels(model: nn.Module, device: torch.device) -> tuple[Kernel, ...]:
    """The kernels of `model` on `device`, the most frequent first."""
    counts: dict[Kernel, int] = {}
    for module in model.modules():
        kernel = kernel_of(module, device)
        if kernel is not None:
            counts[kernel] = counts.get(kernel, 0) + 1
    found = [
        Kernel(kernel.name, count, kernel.slow, kernel.uncapturable)
        for kernel, count in counts.items()
    ]
    return tuple(sorted(found, key=lambda kernel: (-kernel.count, kernel.name)))


def log_kernels(kernels: Iterable[Kernel]) -> None:
    """One line for each kernel; a warning for each slow one."""
    for kernel in kernels:
        if kernel.slow is None:
            _log.info("%d Linears by %s", kernel.count, kernel.name)
        else:
            _log.warning("%d Linears by %s: slow, %s", kernel.count, kernel.name, kernel.slow)


def kernel_of(module: Any, device: torch.device) -> Kernel | None:
    """The kernel behind one module, None if the module is no Linear."""
    kind = type(module)
    library = kind.__module__.split(".")[0]
    if kind is nn.Linear:
        return Kernel(f"torch Linear {_short(module.weight.dtype)}")
    if kind is PackedLinear:
        return Kernel("oneDNN packed Linear float32")
    if kind is CodedLinear:
        return Kernel(f"quantgate fused {module.name} float32")
    if kind is NativeLinear:
        return Kernel("quantgate packed Linear float32")
    if library == "bitsandbytes":
        return _of_bitsandbytes(module, device)
    if library == "gptqmodel":
        return _of_gptqmodel(module, device)
    if kind is FusedInt8Linear:
        return _of_llm_int8("quantgate fused", module.threshold, device)
    if kind is Int8Linear:
        return _of_llm_int8("quantgate", module.threshold, device)
    if kind.__name__ == "GptqLinear":
        return _of_ours(module, device)
    if kind.__name__.endswith("Experts") and hasattr(module, "gate_up_proj"):
        return Kernel(
            f"{library} {kind.__name__}",
            uncapturable="which experts compute is decided by the tokens of each step",
        )
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):
        return Kernel(f"{library} {kind.__name__}")
    if kind.__name__ == "Conv1D" and library == "transformers":
        return Kernel(f"transformers Conv1D {_short(module.weight.dtype)}")
    return None


def _of_llm_int8(library: str, threshold: float, device: torch.device) -> Kernel:
    name = f"{library} LLM.int8 on {device.type}"
    if threshold == math.inf:
        return Kernel(f"{name}, without outliers")
    return Kernel(
        f"{name}, outliers beyond {threshold:g}",
        uncapturable=(
            f"LLM.int8 looks for outliers (threshold {threshold:g}) on the host in each layer"
        ),
    )


def _of_bitsandbytes(module: Any, device: torch.device) -> Kernel | None:
    if type(module).__name__ == "Linear8bitLt":
        return _of_llm_int8("bitsandbytes", float(module.state.threshold) or math.inf, device)
    if not hasattr(module, "quant_state") and not hasattr(module, "compute_dtype"):
        return None
    kind = getattr(module.weight, "quant_type", "4-bit")
    compute = module.compute_dtype
    slow = None
    if device.type == "cuda" and compute == torch.float32:
        slow = "it computes in FP32: load it with --dtype bfloat16"
    name = f"bitsandbytes {kind} on {device.type}"
    return Kernel(name if compute is None else f"{name}, {_short(compute)}", slow=slow)


def _of_gptqmodel(module: nn.Module, device: torch.device) -> Kernel | None:
    name = type(module).__name__
    if not hasattr(module, "bits"):
        return None
    slow = None
    if device.type == "cuda" and name.startswith("Torch"):
        slow = f"it {_ONE_BY_ONE}: build GPTQModel with its Marlin kernels for this device"
    return Kernel(f"gptqmodel {name} {module.bits} bit", slow=slow)


def _of_ours(module: Any, device: torch.device) -> Kernel:
    slow = None
    if device.type == "cuda":
        slow = f"it {_ONE_BY_ONE}: install gptqmodel and optimum for their CUDA kernels"
    return Kernel(f"quantgate GptqLinear {4 if module.is_packed else 8} bit", slow=slow)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
