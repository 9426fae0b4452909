"""Paged attention on the CPU by the kernels in `native/`: decodes and prompts in one call.

`NativeStep` is what they need to know of a step; `torch_paged` is the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.native.library import MAX_ROWS, LayerKernels


@dataclass(frozen=True, slots=True)
class NativeStep:
    """What attention needs to know about one step of T tokens.

    `slots` [T] is page * page_size + offset of each token. `pages` lists the pages of one sequence
    after another; a row of `blocks` [n, 4] is a token, how many from there on, the position of the
    first, and where the pages of its sequence begin in `pages`.
    """

    kernels: LayerKernels
    kv: KVStorage
    slots: Tensor
    pages: Tensor
    blocks: Tensor


def build_step(
    kernels: LayerKernels,
    kv: KVStorage,
    pages: Sequence[Sequence[int]],
    starts: Sequence[int],
    lengths: Sequence[int],
    *,
    group: int,
) -> NativeStep:
    """The step that computes tokens `starts[i]` to `starts[i] + lengths[i]` of each sequence.

    Args:
        pages: those that each sequence holds, in order.
        group: query heads on a key head.
    """
    held = np.fromiter(map(len, pages), np.int64, len(pages))
    flat = np.fromiter((page for row in pages for page in row), np.int32, int(held.sum()))
    offset = np.cumsum(held) - held
    first, length = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    token = np.cumsum(length) - length
    row, position = _spread(first, length, 1)
    slots = flat[offset[row] + position // kv.page_size].astype(np.int64) * kv.page_size
    slots += position % kv.page_size
    # Long prompts are cut, so that all threads share them.
    size = max(1, min(MAX_ROWS // group, kv.page_size))
    row, position = _spread(first, length, size)
    count = np.minimum(size, first[row] + length[row] - position)
    blocks = np.stack([token[row] + position - first[row], count, position, offset[row]], axis=1)
    return NativeStep(
        kernels,
        kv,
        torch.from_numpy(slots),
        torch.from_numpy(flat),
        torch.from_numpy(blocks.astype(np.int32)),
    )


def attend(
    step: NativeStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Store `key` and `value` [T, K, D] of this step, attend with `query` [T, N, D]: [T, N, D]."""
    return step.kernels.attend(
        step.kv,
        layer,
        query,
        key,
        value,
        slots=step.slots,
        pages=step.pages,
        blocks=step.blocks,
        scale=scale,
    )


def _spread(
    first: NDArray[np.int64], length: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each part of `size` positions: the row it belongs to, and where it begins."""
    parts = -(-length // size)
    row = np.repeat(np.arange(len(first)), parts)
    index = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
    return row, first[row] + index * size
