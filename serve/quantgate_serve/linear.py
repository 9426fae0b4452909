"""Plain Linears for the CPU: weights packed once by oneDNN, several Linears over one input as one.

torch's own FP32 Linear goes to MKL, which on a Zen 4 takes about twice the time of oneDNN's packed
product at 4 to 64 rows (benchmarks/serving.py prints both). The arithmetic stays FP32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

# A hint for the layout. Packing for 32 rows instead of the real number was from 16 % faster (at 16
# rows) to 19 % slower (at 8), on a busy machine; this number was not compared.
_PACKED_FOR_ROWS = 64


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed product stands for this weight here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class PackedLinear(nn.Module):
    """y = x W^T + b over x [T, in] in FP32. Holds the packed weight only."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, out]."""
        return self._call(x, "none")

    def forward_silu(self, x: Tensor) -> Tensor:
        """silu(y) without a pass of its own."""
        return self._call(x, "swish")

    def forward_times(self, x: Tensor, other: Tensor) -> Tensor:
        """y * other without a pass of its own."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self.weight, self.bias, "mul"
        )
        return result

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _call(self, x: Tensor, activation: str) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self.weight, self.bias, activation, [], ""
        )
        return result


class SideBySide(nn.Module):
    """Linears over one input that cannot be joined (quantized ones), outputs one after another."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


class Gated(nn.Module):
    """silu(gate(x)) * up(x)."""

    def __init__(self, gate: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.gate, self.up = gate, up

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.gate, PackedLinear) and isinstance(self.up, PackedLinear):
            return self.up.forward_times(x, self.gate.forward_silu(x))
        result: Tensor = functional.silu(self.gate(x)) * self.up(x)
        return result


def is_plain(linear: nn.Module) -> bool:
    """An nn.Linear itself: a subclass may hold codes in place of weights."""
    return type(linear) is nn.Linear


def prepare(linear: nn.Module) -> nn.Module:
    """`linear`, packed where that is possible."""
    if isinstance(linear, nn.Linear) and is_plain(linear) and can_pack(linear.weight):
        return PackedLinear(linear.weight.detach(), _bias(linear))
    return linear


def prepare_all(model: nn.Module) -> None:
    """Replace every plain Linear of `model` by its packed form, where that is possible."""
    found = [(name, module) for name, module in model.named_modules() if is_plain(module)]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, prepare(module))


def join(linears: Sequence[nn.Linear], rows: Sequence[Tensor | None]) -> nn.Module:
    """Plain `linears` over the same input as one. `rows[i]` reorders the outputs of the i-th."""
    weights, biases = [], []
    for linear, order in zip(linears, rows, strict=True):
        weight, bias = linear.weight.detach(), _bias(linear)
        if bias is None:
            bias = weight.new_zeros(weight.shape[0])
        weights.append(weight if order is None else weight[order])
        biases.append(bias if order is None else bias[order])
    weight = torch.cat(weights)
    bias = torch.cat(biases) if any(linear.bias is not None for linear in linears) else None
    if can_pack(weight):
        return PackedLinear(weight, bias)
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()
