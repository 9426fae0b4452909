"""Weights that are not quantized: casts, and what a scheme leaves as it is.

They are measured against rounding to BF16, which is what every scheme stores them in. In a 4-bit
variant the matrices left alone (embeddings, the output head) are measured against rounding each row
to 8 bits, which is harmless there: on the demo model an INT8 embedding adds 1 to 2 % of the KL that
rounding the weights to 4 bits causes. Of what LLM.int8() causes it adds 56 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quantgate.audit.checkpoint import Checkpoint
from quantgate.audit.llm_int8 import LARGEST_CODE
from quantgate.audit.rounding import bf16_rounding_errors, uniform_rounding_errors
from quantgate.audit.stored import CannotDequantize, Grouping


@dataclass(slots=True, kw_only=True)
class PlainWeight:
    """A floating-point tensor seen as a matrix; each row is a group."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, int]
    grouping: Grouping
    tolerates_int8: bool
    problems: Sequence[str] = ()

    @property
    def num_bits(self) -> int:
        return 8 * self.checkpoint[self.name].num_bytes

    def dequantize(self, start: int, stop: int) -> Tensor:
        num_in = self.shape[1]
        flat = self.checkpoint.read_flat(self.name, start * num_in, stop * num_in)
        return flat.float().view(stop - start, num_in)

    def rounding_errors(self, groups: Tensor) -> Tensor:
        if self.tolerates_int8:
            return uniform_rounding_errors(groups, steps=2 * LARGEST_CODE)
        return bf16_rounding_errors(groups)

    def steps(self, start: int, stop: int) -> Tensor | None:
        return None


def read_weight(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], *, tolerates_int8: bool
) -> PlainWeight:
    """Opens one tensor.

    Args:
        shape: of the source's tensor, of any number of dimensions.
        tolerates_int8: measure against rounding to 8 bits instead of BF16.

    Raises:
        CannotDequantize: another shape, or not floating-point.
    """
    stored = checkpoint[name]
    if stored.shape != shape:
        raise CannotDequantize(f"is {stored.shape}; expected {shape}")
    if not stored.dtype.is_floating_point:
        raise CannotDequantize(f"is stored as {stored.dtype}; expected a floating-point type")
    matrix = matrix_shape(shape)
    return PlainWeight(
        checkpoint=checkpoint,
        name=name,
        shape=matrix,
        grouping=Grouping(length=matrix[1]),
        tolerates_int8=tolerates_int8 and len(shape) > 1,
    )


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, columns] of a tensor of any rank; a vector is one row."""
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    num_columns = 1
    for length in shape[1:]:
        num_columns *= length
    return shape[0], num_columns
