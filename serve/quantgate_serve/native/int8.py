"""Calls int8.c: LLM.int8 in one pass, with torch's threads.

Shapes: T rows, K input channels in groups of G, N output channels in tiles of L.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from quantgate_serve.native.library import (
    INT,
    POINTER,
    KernelsUnavailableError,
    address,
    bind,
    find,
)

# What int8.c is written for.
MAX_PARTS = 3
_GROUP_BYTES = 4  # of the codes of a row of x
CACHE_LINE = 64
_LINE_FLOATS = 16


@dataclass(frozen=True, slots=True)
class Int8Codes:
    """One Linear as int8.c reads it. Everything is contiguous and on the CPU.

    Args:
        codes: [N / L, K / G, L, G] int8.
        sums: [N / L * L] int32, what the kernels add to codes of x times the sum of an output's.
        scales: [N / L * L] FP32, the largest absolute weight of an output.
        bias: [N / L * L] FP32 or None.
    """

    num_in: int
    num_out: int
    codes: Tensor
    sums: Tensor
    scales: Tensor
    bias: Tensor | None


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "sums", "scales", "bias")),
        ("num_in", ctypes.c_int64),
        ("num_out", ctypes.c_int64),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        ("parts", _Linear * MAX_PARTS),
        ("num_parts", ctypes.c_int64),
        ("is_split", ctypes.c_int64),
        ("threshold", ctypes.c_float),
    )


class Int8Product:
    """Linears over one input, ready to be called; keeps their tensors alive."""

    def __init__(self, parts: Sequence[Int8Codes], *, threshold: float, is_split: bool) -> None:
        """
        Args:
            parts: up to three that agree in K.
            threshold: what an outlier is at least, as FP16 holds it.
            is_split: outputs are one matrix after another, not side by side.
        """
        self._kept = tuple(parts)
        self.num_in = parts[0].num_in
        self.sizes = [part.num_out for part in parts]
        self.num_out = sum(self.sizes)
        linears = [
            _Linear(
                part.codes.data_ptr(),
                part.sums.data_ptr(),
                part.scales.data_ptr(),
                address(part.bias),
                part.num_in,
                part.num_out,
            )
            for part in parts
        ]
        self._struct = _Product((_Linear * MAX_PARTS)(*linears), len(parts), is_split, threshold)
        self.address = ctypes.addressof(self._struct)


@dataclass(frozen=True, slots=True)
class Outliers:
    """Channels of an input that hold outliers; they add `inputs` times `weights` transposed.

    Args:
        inputs: [T, channels] FP32.
        weights: [outputs, channels] FP32 of each part. Each begins at a cache line, as a tensor of
            its own would: with one row MKL's order of summation depends on that.
    """

    inputs: Tensor
    weights: list[Tensor]


class NotFiniteError(Exception):
    """An input is not finite in FP16, where the kernels round otherwise than torch."""


class Int8Kernels:
    """The functions of int8.c over tensors.

    On this CPU `lanes` is L, `group` is G, and `offset` is added to codes of x.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """
        Raises:
            KernelsUnavailableError: int8.c is not written for this CPU.
        """
        self.lanes: int = INT.in_dll(library, "int8_lanes").value
        self.group: int = INT.in_dll(library, "int8_group").value
        self.offset: int = INT.in_dll(library, "int8_offset").value
        if self.group == 0:
            raise KernelsUnavailableError(
                "LLM.int8 needs a CPU with AVX2, and with VNNI if it has AVX-512"
            )
        self._multiply = bind(
            library.multiply_int8, POINTER, POINTER, INT, *[POINTER] * 5, INT, result=INT
        )
        self._pick = bind(
            library.pick_outliers, POINTER, POINTER, INT, POINTER, INT, POINTER, POINTER
        )

    def multiply(self, product: Int8Product, x: Tensor) -> tuple[Tensor, Outliers | None]:
        """The rounded `x` [T, K], FP32 and contiguous, times the weights; and what is left out.

        Returns:
            y [T * N] FP32, as the product is split, and the outliers, if there are any.

        Raises:
            NotFiniteError: the kernels cannot tell what torch would make of this input.
        """
        rows, num_in = x.shape
        y = x.new_empty(rows * product.num_out)
        code_bytes = _GROUP_BYTES // self.group
        # The channels with outliers, each row's largest, the codes of x, whether a channel has any.
        sizes = (
            8 * num_in,
            4 * rows,
            rows * (num_in * code_bytes + 2 * CACHE_LINE),
            num_in + self.lanes,
        )
        scratch = torch.empty(sum(sizes), dtype=torch.uint8)
        columns, largest, codes, is_outlier = accumulate(sizes[:-1], initial=scratch.data_ptr())
        found = self._multiply(
            product.address,
            x.data_ptr(),
            rows,
            codes,
            largest,
            is_outlier,
            columns,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        if found < 0:
            raise NotFiniteError
        if found == 0:
            return y, None
        inputs = x.new_empty(rows, found)
        counts = [num_out * found for num_out in product.sizes]
        starts = [0, *accumulate(-(-count // _LINE_FLOATS) * _LINE_FLOATS for count in counts)]
        weights = x.new_empty(starts[-1])
        self._pick(
            product.address,
            x.data_ptr(),
            rows,
            columns,
            found,
            inputs.data_ptr(),
            weights.data_ptr(),
        )
        parts = zip(starts, counts, strict=False)
        return y, Outliers(
            inputs, [weights[start : start + count].view(-1, found) for start, count in parts]
        )


@cache
def find_int8_kernels() -> Int8Kernels | None:
    """The kernels for this machine, compiled if need be; None, and a line in the log, if not."""
    return find(Int8Kernels, "LLM.int8")
