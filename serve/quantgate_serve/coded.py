"""NF4 and GPTQ Linears for the CPU by kernels in C that expand weights where they use them.

The weights are those of GptqLinear and of bitsandbytes' Linear4bit, bit for bit, in the memory that
their formats take; sums are FP32, in another order than torch's. What the kernels are not written
for stays as it was loaded.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantgate_serve.gptq import GptqLinear
from quantgate_serve.native.quantized import MAX_PARTS, Codes, Product, QuantizedKernels

_TENSORS = ("codes", "scales", "zeros", "outer", "bias")


class CodedLinear(nn.Module):
    """y = x W^T + b over FP32 x [..., in]."""

    order: Tensor | None

    def __init__(
        self, name: str, codes: Codes, order: Tensor | None, kernels: QuantizedKernels
    ) -> None:
        """
        Args:
            name: the format, for people.
            order: [in], which channel of x comes where; None for as they are.
        """
        super().__init__()
        self.name = name
        self.part = codes
        self.in_features, self.out_features = codes.num_in, codes.num_out
        for key in _TENSORS:
            self.register_buffer(key, getattr(codes, key), persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.kernels = kernels
        self.product = Product([codes], order=order, is_gated=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out]."""
        return _multiply(self.kernels, self.product, x)

    def extra_repr(self) -> str:
        return f"{self.name}, in_features={self.in_features}, out_features={self.out_features}"


class CodedProduct(nn.Module):
    """CodedLinears over one input in one call: all outputs in a row, or silu(first) * second."""

    def __init__(self, linears: Sequence[CodedLinear], *, is_gated: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        parts = [linear.part for linear in linears]
        self._kernels = linears[0].kernels
        self.product = Product(parts, order=linears[0].order, is_gated=is_gated)

    def forward(self, x: Tensor) -> Tensor:
        """[..., the sum of out], or [..., out]."""
        return _multiply(self._kernels, self.product, x)


def can_join(linears: Sequence[nn.Module], *, is_gated: bool = False) -> bool:
    """Whether `linears` are CodedLinears that agree in their inputs, and in outputs for a gate."""
    coded = [linear for linear in linears if isinstance(linear, CodedLinear)]
    if len(coded) < len(linears) or len(coded) > MAX_PARTS:
        return False
    if any(not _agree(coded[0], other) for other in coded[1:]):
        return False
    return not is_gated or (len(coded) == 2 and coded[0].out_features == coded[1].out_features)


def join(linears: Sequence[Any], *, is_gated: bool = False) -> CodedProduct | None:
    """`linears` as one product, None where that cannot be."""
    if not can_join(linears, is_gated=is_gated):
        return None
    return CodedProduct(linears, is_gated=is_gated)


def replace_all(model: nn.Module, kernels: QuantizedKernels | None) -> None:
    """Replace every NF4, FP4 and GPTQ Linear of `model`, on the CPU in FP32, where possible.

    Nothing happens where there are no kernels.
    """
    if kernels is None:
        return
    for name, module in [*model.named_modules()]:
        coded = code(module, kernels)
        if coded is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, coded)


def code(linear: Any, kernels: QuantizedKernels) -> CodedLinear | None:
    """`linear` with its weights in the order of the kernels; None where they cannot take it."""
    kind = type(linear)
    # What inherits may compute something else.
    if kind is GptqLinear:
        return _of_gptq(linear, kernels)
    if kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes."):
        return _of_bitsandbytes(linear, kernels)
    return None


def _of_gptq(linear: GptqLinear, kernels: QuantizedKernels) -> CodedLinear | None:
    group, num_out, lanes = linear.group_length, linear.out_features, kernels.lanes
    if group % 8 != 0:
        return None
    bits, codes = 4 if linear.is_packed else 8, linear.codes
    if linear.is_packed:
        codes = torch.cat((codes & 15, codes >> 4), dim=1)
    scales = linear.scales.squeeze(1)
    halves = scales.half()
    zeros = linear.zeros.squeeze(1)
    # A byte does not hold the 256 that an 8-bit code of format v1 can have.
    zero_offset = int(zeros.max() > 255)
    part = Codes(
        linear.in_features,
        num_out,
        group,
        _pack(_tile(codes.reshape(-1, num_out), lanes), bits),
        _tile(halves if torch.equal(halves.float(), scales) else scales, lanes),
        zeros=_tile((zeros - zero_offset).to(torch.uint8), lanes),
        zero_offset=zero_offset,
        values=_table(tuple(range(16))) if linear.is_packed else None,
        bias=_pad(linear.bias, lanes),
    )
    return CodedLinear(
        f"GPTQ {bits} bit", part, None if linear.is_sorted else linear.order, kernels
    )


def _of_bitsandbytes(linear: Any, kernels: QuantizedKernels) -> CodedLinear | None:
    state = getattr(linear.weight, "quant_state", None) or linear.quant_state
    num_out, num_in = int(linear.out_features), int(linear.in_features)
    if state is None or tuple(state.shape) != (num_out, num_in):
        return None
    group, lanes = int(state.blocksize), kernels.lanes
    # Where blocks reach over the end of a row, bitsandbytes' own kernels for the CPU misread them.
    if num_in % group != 0 or group % 8 != 0 or linear.compute_dtype != torch.float32:
        return None
    if state.nested and state.state2.blocksize.bit_count() != 1:
        return None
    pairs = linear.weight.data.view(torch.uint8).view(num_out, num_in // 2)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).view(num_out, num_in)
    groups = num_in // group
    scales = state.absmax.view(num_out, groups)
    nested: dict[str, Any] = {}
    if state.nested:
        each = int(state.state2.blocksize)
        outer = state.state2.absmax.float()
        padded = -(-num_out // lanes) * lanes * groups
        nested = {
            "nested": _table(tuple(state.state2.code.tolist())),
            "outer": functional.pad(outer, (0, max(0, -(-padded // each) - len(outer)))),
            "outer_shift": each.bit_length() - 1,
            "nested_offset": float(state.offset),
        }
    part = Codes(
        num_in,
        num_out,
        group,
        _pack(_tile(codes.t(), lanes), 4),
        _tile((scales if state.nested else scales.float()).t(), lanes),
        values=_table(tuple(state.code.tolist())),
        bias=_pad(None if linear.bias is None else linear.bias.detach().float(), lanes),
        **nested,
    )
    return CodedLinear(str(state.quant_type), part, None, kernels)


@cache
def _table(values: tuple[float, ...]) -> Tensor:
    """FP32; one for all Linears, so that a cache holds it once."""
    return torch.tensor(values, dtype=torch.float32)


def _tile(columns: Tensor, lanes: int) -> Tensor:
    """[K, N] as [N / lanes, K, lanes]; what is missing of the last tile is 0."""
    padded = functional.pad(columns, (0, -columns.shape[1] % lanes))
    return padded.view(len(columns), -1, lanes).transpose(0, 1).contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [tiles, K, lanes] as words [tiles, K * bits / 32, lanes], lowest bits first."""
    each = 32 // bits
    words = torch.zeros_like(codes[:, ::each], dtype=torch.int32)
    for index in range(each):
        words |= codes[:, index::each].int() << (bits * index)
    return words


def _pad(bias: Tensor | None, lanes: int) -> Tensor | None:
    return None if bias is None else functional.pad(bias.float(), (0, -len(bias) % lanes))


def _agree(one: CodedLinear, other: CodedLinear) -> bool:
    first, second = one.part, other.part
    if (first.num_in, first.group) != (second.num_in, second.group):
        return False
    return _are_equal(first.values, second.values) and _are_equal(one.order, other.order)


def _are_equal(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _multiply(kernels: QuantizedKernels, product: Product, x: Tensor) -> Tensor:
    y = kernels.multiply(product, x.reshape(-1, product.num_in).contiguous())
    return y.view(*x.shape[:-1], product.num_out)
