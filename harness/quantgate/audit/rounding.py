"""Healthy quantizers: the error that rounding alone makes, which every limit is relative to.

They return errors, not weights: an audit compares sizes of error, group by group.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Source: Dettmers et al., QLoRA (2023), appendix E: quantiles of a normal distribution."""

_NESTED_BLOCK = 256
_TABLE_SIZE = 1 << 12


def uniform_rounding_errors(groups: Tensor, *, steps: int) -> Tensor:
    """[G] squared error of round-to-nearest on a symmetric grid of `steps` steps per 2 * absmax.

    Clamping the largest positive weight from half a step beyond the grid onto it is an error of
    half a step, as rounding it would be, so it needs no code of its own.
    """
    step = groups.abs().amax(dim=1).mul_(2 / steps)
    scaled = groups * _inverse(step).unsqueeze(1)
    scaled.sub_(scaled.round())
    return squared_norms(scaled).mul_(step.square())


def bf16_rounding_errors(groups: Tensor) -> Tensor:
    """[G] squared error of a cast to BF16."""
    return squared_norms(groups.bfloat16().float().sub_(groups))


def nf4_rounding_errors(groups: Tensor, *, is_double_quantized: bool) -> Tensor:
    """[G] squared error of NF4 with one absmax a group, itself rounded to 8 bits if nested.

    The mean that nested scales are stored around is that of the groups given, where bitsandbytes
    takes the whole tensor's: another healthy quantizer of the same kind.
    """
    absmax = groups.abs().amax(dim=1)
    scaled = groups * _inverse(absmax).unsqueeze(1)
    nearest = _nearest_nf4(scaled)
    stored = _nested(absmax) if is_double_quantized else absmax
    return squared_norms(nearest.mul_(stored.unsqueeze(1)).sub_(groups))


@cache
def dynamic_map() -> Tensor:
    """[256] the signed 8-bit dynamic data type that nested scales are stored in, ascending.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022), section 1.3:
    a sign, an exponent in unary and a linear fraction in the bits that are left; 0 and 1 are added.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float64)
        means = (bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def squared_norms(groups: Tensor) -> Tensor:
    """[G] of [G, length]."""
    norms: Tensor = torch.linalg.vector_norm(groups, dim=1)
    return norms.square_()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)


def _nearest_nf4(scaled: Tensor) -> Tensor:
    """The nearest code of each value in -1 to 1, found in a table of 4,096 equal steps.

    A value within 1/4096 of the middle between two codes may take the other one, which is as near.
    """
    index = (scaled + 1).mul_((_TABLE_SIZE - 1) / 2).round_().int()
    return _nf4_table().index_select(0, index.view(-1)).view(scaled.shape)


@cache
def _nf4_table() -> Tensor:
    codes = torch.tensor(NF4_CODES)
    grid = torch.linspace(-1, 1, _TABLE_SIZE)
    return codes[torch.bucketize(grid, (codes[1:] + codes[:-1]) / 2)]


def _nested(absmax: Tensor) -> Tensor:
    """Absmax rounded to 8 bits: blocks of 256 around the mean, in the dynamic data type."""
    mean = absmax.mean()
    count = math.ceil(len(absmax) / _NESTED_BLOCK)
    padded = torch.zeros(count * _NESTED_BLOCK)
    padded[: len(absmax)] = absmax - mean
    blocks = padded.view(count, _NESTED_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    codes = dynamic_map()
    index = torch.bucketize(blocks * _inverse(scale), (codes[1:] + codes[:-1]) / 2)
    return (codes[index] * scale).flatten()[: len(absmax)] + mean
