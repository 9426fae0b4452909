"""Paged attention on the CPU by the kernels in `native/`: decodes and prompts in one call.

`NativeStep` is what they need to know of a step; `torch_paged` is the reference.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.native.layer import MAX_ROWS, LayerKernels
from quantgate_serve.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class NativeStep:
    """What attention needs to know about one step of T tokens.

    `slots` [T] is page * page_size + offset of each token. `pages` has the pages of one sequence
    after another, with room between them; a row of `blocks` [n, 4] is a token, how many from there
    on, the position of the first, and where the pages of its sequence begin in `pages`.
    """

    kernels: LayerKernels
    kv: KVStorage
    slots: Tensor
    pages: Tensor
    blocks: Tensor


def build_step(
    kernels: LayerKernels, kv: KVStorage, inputs: StepInputs, *, group: int
) -> NativeStep:
    """The step over `inputs`, with `group` query heads on a key head. It reads their table."""
    # Long prompts are cut, so that all threads share them.
    size = max(1, min(MAX_ROWS // group, kv.page_size))
    row: NDArray[np.int64] | slice = slice(None)
    behind: NDArray[np.int64] | int = 0
    count = len(inputs.starts)
    if inputs.num_decodes < count:
        parts = -(-inputs.lengths // size)
        row = np.arange(count).repeat(parts)
        behind = (np.arange(len(row)) - (parts.cumsum() - parts)[row]) * size
        count = len(row)
    blocks = np.empty((count, 4), dtype=np.int32)
    blocks[:, 0] = inputs.firsts[row] + behind
    blocks[:, 1] = np.minimum(size, inputs.lengths[row] - behind)
    blocks[:, 2] = inputs.starts[row] + behind
    blocks[:, 3] = inputs.rows[row] * inputs.table.shape[1]
    return NativeStep(
        kernels,
        kv,
        torch.from_numpy(inputs.slots),
        torch.from_numpy(inputs.table.reshape(-1)),
        torch.from_numpy(blocks),
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
