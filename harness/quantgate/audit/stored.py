"""What every stored weight has in common: rows that can be dequantized, and groups of one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class CannotDequantize(Exception):
    """The stored tensors do not fit together; the message says which and how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Which weights of a row-major [out, in] matrix share a scale.

    `order` permutes the input channels so that each group is contiguous; None where it already is.
    `length` weights in that order make a group; groups may run over the ends of rows (NF4 blocks).
    """

    length: int
    order: Tensor | None = None


class StoredWeight(Protocol):
    """One quantized or plain weight of an artifact, and the healthy quantizer of its scheme."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in], as in the source."""

    @property
    def grouping(self) -> Grouping: ...

    @property
    def num_bits(self) -> int:
        """All bits stored for it: codes, scales, zero points, orders."""

    @property
    def problems(self) -> Sequence[str]:
        """What is stored otherwise than the format or the config says."""

    def dequantize(self, start: int, stop: int) -> Tensor:
        """FP32 [stop - start, in], columns in the grouping's order."""

    def rounding_errors(self, groups: Tensor) -> Tensor:
        """What rounding alone does to weights at this scheme.

        Args:
            groups: FP32 [G, length] source weights, one group a row.

        Returns:
            [G] summed squared error of each group under a healthy quantizer of the same scheme.
        """

    def steps(self, start: int, stop: int) -> Tensor | None:
        """FP32 [groups in these rows] distance between neighbouring codes, where it is constant."""
