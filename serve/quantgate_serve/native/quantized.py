"""Calls quantized.c: Linears over 4- and 8-bit codes, with torch's threads.

Shapes: T rows, K input channels, N output channels in tiles of L, G groups of input channels.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantgate_serve.native.library import INT, POINTER, address, bind, find

# What quantized.c is written for.
MAX_PARTS = 3
CHUNK = 128
_SCALE_KINDS = {torch.float32: 0, torch.float16: 1, torch.uint8: 2}


@dataclass(frozen=True, slots=True)
class Codes:
    """One Linear as quantized.c reads it. Everything is contiguous and on the CPU.

    Args:
        codes: [N / L, K / 8, L] int32 of eight 4-bit codes each, lowest first, or
            [N / L, K / 4, L] int32 of four 8-bit codes.
        scales: [N / L, G, L], FP32, FP16, or uint8 where scales are themselves quantized.
        zeros: [N / L, G, L] uint8, to which `zero_offset` is added, or None.
        values: [16] FP32, what a 4-bit code stands for; None where codes have eight bits.
        nested: [256] FP32, what a byte of `scales` stands for.
        outer: FP32, what it is multiplied with, one for 2 ** outer_shift scales of [N, G].
        nested_offset: what is added to it then.
        bias: [N / L * L] FP32 or None.
    """

    num_in: int
    num_out: int
    group: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    zero_offset: int = 0
    values: Tensor | None = None
    nested: Tensor | None = None
    outer: Tensor | None = None
    outer_shift: int = 0
    nested_offset: float = 0.0
    bias: Tensor | None = None


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "values")),
        *((name, ctypes.c_void_p) for name in ("nested", "outer", "bias")),
        *((name, ctypes.c_int64) for name in ("num_in", "num_out", "group", "num_groups")),
        *((name, ctypes.c_int32) for name in ("scale_kind", "zero_offset", "outer_shift")),
        ("nested_offset", ctypes.c_float),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        ("parts", _Linear * MAX_PARTS),
        ("num_parts", ctypes.c_int64),
        ("is_gated", ctypes.c_int64),
        ("order", ctypes.c_void_p),
    )


class Product:
    """Linears over one input, ready to be called; keeps their tensors alive."""

    def __init__(self, parts: Sequence[Codes], *, order: Tensor | None, is_gated: bool) -> None:
        """
        Args:
            parts: up to three that agree in K, group and bits; two of one shape where `is_gated`.
            order: [K] int64, which channel of the input comes where; None for as they are.
            is_gated: the result is silu(first) * second, not one after the other.
        """
        self._kept = (*parts, order)
        self.num_in = parts[0].num_in
        self.num_out = parts[0].num_out if is_gated else sum(part.num_out for part in parts)
        self.has_order = order is not None
        self._struct = _Product(
            (_Linear * MAX_PARTS)(*map(_describe, parts)), len(parts), is_gated, address(order)
        )
        self.address = ctypes.addressof(self._struct)


class QuantizedKernels:
    """The functions of quantized.c over tensors. `lanes` is L on this CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.lanes: int = INT.in_dll(library, "lanes").value
        self._direct_rows = INT.in_dll(library, "direct_rows").value
        self._multiply = bind(library.multiply_codes, POINTER, POINTER, INT, POINTER, POINTER, INT)

    def multiply(self, product: Product, x: Tensor) -> Tensor:
        """[T, N] of `x` [T, K], FP32 and contiguous."""
        rows = len(x)
        y = x.new_empty((rows, product.num_out))
        scratch = None
        if rows > self._direct_rows or product.has_order:
            scratch = x.new_empty(rows * -(-product.num_in // CHUNK) * CHUNK)
        self._multiply(
            product.address,
            x.data_ptr(),
            rows,
            address(scratch),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y


@cache
def find_quantized_kernels() -> QuantizedKernels | None:
    """The kernels for this machine, compiled if need be; None, and a line in the log, if not."""
    return find(QuantizedKernels, "quantized Linears")


def _describe(part: Codes) -> _Linear:
    return _Linear(
        codes=part.codes.data_ptr(),
        scales=part.scales.data_ptr(),
        zeros=address(part.zeros),
        values=address(part.values),
        nested=address(part.nested),
        outer=address(part.outer),
        bias=address(part.bias),
        num_in=part.num_in,
        num_out=part.num_out,
        group=part.group,
        num_groups=part.num_in // part.group,
        scale_kind=_SCALE_KINDS[part.scales.dtype],
        zero_offset=part.zero_offset,
        outer_shift=part.outer_shift,
        nested_offset=part.nested_offset,
    )
