"""FP32 Linears by linear.c: weights in panels of 32 outputs, in huge pages."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantgate_serve import huge_pages
from quantgate_serve.native.layer import LANES, LayerKernels

_PANEL = 2 * LANES


def can_multiply(weight: Tensor) -> bool:
    """Whether linear.c is written for this weight: its sums fill the registers of AVX-512."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.shape[0] % LANES == 0
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
        """`weight` [out, in], `out` divisible by 16; packed into `room` [packed_size] if given."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if room is None:
            room = huge_pages.zeros((packed_size(weight),), weight.dtype)
        self.register_buffer("weight", _pack(weight, room), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.contiguous())
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """[T, out]."""
        return self._kernels.multiply(x.contiguous(), self.weight, self.bias, self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def packed_size(weight: Tensor) -> int:
    """How many numbers `weight` [out, in] is in panels."""
    return -(-weight.shape[0] // _PANEL) * _PANEL * weight.shape[1]


def alternate(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both, 16 of `first` and the same 16 of `second` in turn, as linear.c's gate wants."""
    rest = first.shape[1:]
    pairs = torch.stack((first.view(-1, LANES, *rest), second.view(-1, LANES, *rest)), dim=1)
    return pairs.view(2 * len(first), *rest)


def stack(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases over one input as one; a missing bias is zero where another is there."""
    weight = torch.cat([part for part, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    biases = [part.new_zeros(len(part)) if bias is None else bias for part, bias in parts]
    return weight, torch.cat(biases)


def _pack(weight: Tensor, room: Tensor) -> Tensor:
    """Panels [ceil(out / 32), in, 32] of `weight` [out, in] in `room`, which holds zeros."""
    num_outputs, depth = weight.shape
    panels = room.view(-1, depth, _PANEL)
    whole = num_outputs // _PANEL
    panels[:whole] = weight[: whole * _PANEL].view(whole, _PANEL, depth).transpose(1, 2)
    if whole < len(panels):
        panels[whole, :, : num_outputs - whole * _PANEL] = weight[whole * _PANEL :].t()
    return panels
