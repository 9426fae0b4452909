"""FP32 Linears by linear.c: weights in panels of two vectors of outputs, in huge pages.

L is the lanes of a vector: 16 with AVX-512, 8 with AVX2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantgate_serve import huge_pages
from quantgate_serve.native.layer import LayerKernels

# With shorter vectors it was not compared with torch's products.
FEWEST_LANES = 8


def can_multiply(weight: Tensor, kernels: LayerKernels) -> bool:
    """Whether linear.c is written for this weight and this CPU."""
    return (
        kernels.lanes >= FEWEST_LANES
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.shape[0] % kernels.lanes == 0
    )


class NativeLinear(nn.Module):
    """y = x W^T + b over x [T, in] in FP32. Holds the packed weight only."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        kernels: LayerKernels,
        *,
        room: Tensor | None = None,
    ) -> None:
        """`weight` [out, in], `out` divisible by L; packed into `room` [packed_size] if given."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if room is None:
            room = huge_pages.zeros((packed_size(weight, kernels.lanes),), weight.dtype)
        self.register_buffer("weight", _pack(weight, room, kernels.lanes), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.contiguous())
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """[T, out]."""
        return self._kernels.multiply(x.contiguous(), self.weight, self.bias, self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def packed_size(weight: Tensor, lanes: int) -> int:
    """How many numbers `weight` [out, in] is in panels."""
    return -(-weight.shape[0] // (2 * lanes)) * 2 * lanes * weight.shape[1]


def alternate(first: Tensor, second: Tensor, lanes: int) -> Tensor:
    """Rows of both, L of `first` and the same L of `second` in turn, as linear.c's gate wants."""
    rest = first.shape[1:]
    pairs = torch.stack((first.view(-1, lanes, *rest), second.view(-1, lanes, *rest)), dim=1)
    return pairs.view(2 * len(first), *rest)


def stack(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases over one input as one; a missing bias is zero where another is there."""
    weight = torch.cat([part for part, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    biases = [part.new_zeros(len(part)) if bias is None else bias for part, bias in parts]
    return weight, torch.cat(biases)


def _pack(weight: Tensor, room: Tensor, lanes: int) -> Tensor:
    """Panels [ceil(out / 2 L), in, 2 L] of `weight` [out, in] in `room`, which holds zeros."""
    num_outputs, depth = weight.shape
    each = 2 * lanes
    panels = room.view(-1, depth, each)
    whole = num_outputs // each
    panels[:whole] = weight[: whole * each].view(whole, each, depth).transpose(1, 2)
    if whole < len(panels):
        panels[whole, :, : num_outputs - whole * each] = weight[whole * each :].t()
    return panels
