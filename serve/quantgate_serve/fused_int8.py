"""LLM.int8 Linears by kernels in C: the numbers of Int8Linear, and so of bitsandbytes, bit for bit.

What outliers add is left to torch, whose order of summation is part of those numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantgate_serve.llm_int8 import Int8Linear, can_replace
from quantgate_serve.native.int8 import (
    CACHE_LINE,
    MAX_PARTS,
    Int8Codes,
    Int8Kernels,
    Int8Product,
    NotFiniteError,
    Outliers,
)

# Products of a code of x, offset or not, and one of a weight, at most 127, add up in 32 bits.
_MAX_IN = 2**31 // (255 * 127) - 1


class FusedInt8Linear(nn.Module):
    """y = x W^T + b over FP32 x [..., in]: an Int8Linear, its codes as the kernels read them."""

    scales: Tensor

    def __init__(self, linear: Int8Linear, kernels: Int8Kernels) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.threshold = linear.threshold
        self.kernels = kernels
        lanes, group = kernels.lanes, kernels.group
        padded = functional.pad(
            linear.codes, (0, -self.in_features % group, 0, -self.out_features % lanes)
        )
        tiles = padded.view(len(padded) // lanes, lanes, -1, group).transpose(1, 2).contiguous()
        self.part = Int8Codes(
            self.in_features,
            self.out_features,
            codes=tiles,
            sums=padded.sum(1, dtype=torch.int32) * kernels.offset,
            scales=_pad(linear.scales, lanes),
            bias=None if linear.bias is None else _pad(linear.bias.float(), lanes),
        )
        for name in ("codes", "sums", "scales", "bias"):
            self.register_buffer(name, getattr(self.part, name), persistent=False)
        self._call = _Call([self], is_split=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out]."""
        return self._call.side_by_side(x)

    def unfused(self) -> Int8Linear:
        """The Int8Linear that this is; made anew."""
        codes = self.part.codes.transpose(1, 2).flatten(0, 1).flatten(1)
        bias = None if self.part.bias is None else self.part.bias[: self.out_features]
        return Int8Linear(
            codes[: self.out_features, : self.in_features].contiguous(),
            self.part.scales[: self.out_features],
            bias,
            threshold=self.threshold,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class FusedInt8Product(nn.Module):
    """FusedInt8Linears over one input, which is rounded once: their outputs in a row."""

    def __init__(self, linears: Sequence[FusedInt8Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self._call = _Call(linears, is_split=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., the sum of out]."""
        return self._call.side_by_side(x)


class FusedInt8Gate(nn.Module):
    """silu(gate(x)) * up(x), x rounded once. SiLU is torch's: its bits count."""

    def __init__(self, gate: FusedInt8Linear, up: FusedInt8Linear) -> None:
        super().__init__()
        self.linears = nn.ModuleList([gate, up])
        self._call = _Call([gate, up], is_split=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out]."""
        gate, up = self._call.split(x)
        return functional.silu(gate).mul_(up).view(*x.shape[:-1], -1)


class _Call:
    """Linears over one input, in one call of the kernels."""

    def __init__(self, linears: Sequence[FusedInt8Linear], *, is_split: bool) -> None:
        self._linears = list(linears)
        self._kernels = linears[0].kernels
        self._num_in = linears[0].in_features
        self._sizes = [linear.out_features for linear in linears]
        self._product = Int8Product(
            [linear.part for linear in linears],
            # Compared with FP16 numbers, a threshold is one itself.
            threshold=float(torch.tensor(linears[0].threshold).half()),
            is_split=is_split,
        )

    def side_by_side(self, x: Tensor) -> Tensor:
        """[..., the sum of out], for a product that is not split."""
        rows = x.reshape(-1, self._num_in).contiguous()
        try:
            flat, outliers = self._kernels.multiply(self._product, rows)
        except NotFiniteError:
            y = torch.cat(self._unfused(rows), dim=1)
        else:
            y = flat.view(len(rows), -1)
            self._add(torch.split(y, self._sizes, dim=1), outliers)
        return y.view(*x.shape[:-1], -1)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """[T, out] of each Linear, for a product that is split."""
        rows = x.reshape(-1, self._num_in).contiguous()
        try:
            flat, outliers = self._kernels.multiply(self._product, rows)
        except NotFiniteError:
            return self._unfused(rows)
        pieces = torch.split(flat, [len(rows) * size for size in self._sizes])
        parts = [piece.view(len(rows), -1) for piece in pieces]
        self._add(parts, outliers)
        return parts

    def _add(self, parts: Sequence[Tensor], outliers: Outliers | None) -> None:
        """Add what outliers add to `parts` [T, out], with the bits of each part alone."""
        if outliers is None:
            return
        for part, weights in zip(parts, outliers.weights, strict=True):
            if part.data_ptr() % CACHE_LINE == 0:
                part.addmm_(outliers.inputs, weights.t())
            else:
                part.copy_(part.addmm(outliers.inputs, weights.t()))

    def _unfused(self, rows: Tensor) -> list[Tensor]:
        return [linear.unfused()(rows) for linear in self._linears]


def fuse_all(model: nn.Module, kernels: Int8Kernels | None) -> None:
    """Replace every Int8Linear of `model`, and each Linear that one can stand for.

    Nothing happens where there are no kernels.
    """
    if kernels is None:
        return
    for name, module in [*model.named_modules()]:
        linear = Int8Linear.of(module) if can_replace(module) else module
        if type(linear) is Int8Linear and linear.in_features <= _MAX_IN:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FusedInt8Linear(linear, kernels))


def join(linears: Sequence[nn.Module]) -> FusedInt8Product | None:
    """`linears` over one input as one, None where they are not all fused, or not alike."""
    fused = _alike(linears)
    return None if fused is None else FusedInt8Product(fused)


def join_gate(gate: nn.Module, up: nn.Module) -> FusedInt8Gate | None:
    """silu(gate(x)) * up(x) as one, None where they are not both fused, or not alike."""
    fused = _alike([gate, up])
    return None if fused is None else FusedInt8Gate(*fused)


def _alike(linears: Sequence[nn.Module]) -> list[FusedInt8Linear] | None:
    fused = [linear for linear in linears if isinstance(linear, FusedInt8Linear)]
    if len(fused) < len(linears) or len(fused) > MAX_PARTS:
        return None
    kinds = {(linear.in_features, linear.threshold) for linear in fused}
    return fused if len(kinds) == 1 else None


def _pad(values: Tensor, lanes: int) -> Tensor:
    return functional.pad(values, (0, -len(values) % lanes))
