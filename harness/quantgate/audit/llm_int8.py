"""LLM.int8() weights of bitsandbytes: int8 [out, in], and `SCB`, the largest weight of each row.

W[o, i] = code * SCB[o] / 127. Outlier columns are split off in the activations at run time, so all
weights are stored in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantgate.audit.checkpoint import Checkpoint
from quantgate.audit.rounding import uniform_rounding_errors
from quantgate.audit.stored import CannotDequantize, Grouping

LARGEST_CODE = 127
PARTS = ("weight", "SCB", "weight_format")


@dataclass(slots=True, kw_only=True)
class Int8Weight:
    """One module: rows read as they are needed."""

    checkpoint: Checkpoint
    module: str
    shape: tuple[int, int]
    scales: Tensor  # FP32 [out]
    grouping: Grouping
    num_bits: int
    problems: Sequence[str]

    def dequantize(self, start: int, stop: int) -> Tensor:
        codes = self.checkpoint.read_rows(f"{self.module}.weight", start, stop).float()
        return codes.mul_(self.scales[start:stop].unsqueeze(1))

    def rounding_errors(self, groups: Tensor) -> Tensor:
        return uniform_rounding_errors(groups, steps=2 * LARGEST_CODE)

    def steps(self, start: int, stop: int) -> Tensor | None:
        return self.scales[start:stop]


def read_weight(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> Int8Weight:
    """Reads one module.

    Args:
        shape: [out, in] of the source's weight.

    Raises:
        CannotDequantize: the scales are missing, or shapes do not fit the source's.
    """
    if f"{module}.SCB" not in checkpoint:
        raise CannotDequantize("lacks SCB")
    stored = checkpoint[f"{module}.weight"]
    if stored.shape != shape:
        raise CannotDequantize(f"weight is {stored.shape}; expected {shape}")
    largest = checkpoint.read(f"{module}.SCB").flatten().float()
    if len(largest) != shape[0]:
        raise CannotDequantize(f"{len(largest)} scales for {shape[0]} rows")
    problems = []
    if f"{module}.weight_format" in checkpoint:
        layout = checkpoint.read(f"{module}.weight_format").flatten()
        if bool((layout != 0).any()):
            problems.append(f"weight_format is {layout.tolist()}; 0 (by row) is what loaders read")
    return Int8Weight(
        checkpoint=checkpoint,
        module=module,
        shape=shape,
        scales=torch.div(largest, LARGEST_CODE),
        grouping=Grouping(length=shape[1]),
        num_bits=8 * (stored.num_bytes + checkpoint[f"{module}.SCB"].num_bytes),
        problems=problems,
    )
