"""By how much a token is turned at its position: cos and sin for decoder.c."""

from array import array
from typing import Any, TypeAlias

import torch
from torch import Tensor

# Positions whose angles are computed before more are needed.
_FEW_ANGLES = 1024

# Of 64 bits: array("q", …).
Integers: TypeAlias = "array[int]"


class Angles:
    """By what a token is turned at its position: computed once for each, as the model does."""

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        # These turn a token otherwise when a longer sequence is beside it.
        self._are_by_token = "dynamic" in rotary.rope_type or rotary.rope_type == "longrope"
        self._cos = self._sin = torch.empty(0)
        # Where both lie, and how many rows they have.
        self._described = 0, 0, 0

    def of(self, chunks: Integers) -> tuple[int, int, int, bool]:
        """Addresses of cos and sin, how many rows they have, and whether those are by token.

        Else they are by position, and perhaps too few of them.
        """
        if self._are_by_token:
            pieces = zip(chunks[1::3], chunks[2::3], strict=True)
            self._compute(torch.cat([torch.arange(at, at + length) for at, length in pieces]))
        return *self._described, self._are_by_token

    def more(self) -> tuple[int, int, int]:
        """Twice as many positions: where they are now, and how many."""
        self._compute(torch.arange(max(_FEW_ANGLES, 2 * len(self._cos))))
        return self._described

    def _compute(self, positions: Tensor) -> None:
        cos, sin = self._rotary(torch.empty(0), positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        self._described = self._cos.data_ptr(), self._sin.data_ptr(), len(self._cos)
