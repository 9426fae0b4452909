"""Calls layer.c, linear.c and decoder.c, with torch's threads.

Shapes: T tokens, N query heads, K key heads, D head dim, C hidden size.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.native.library import FLOAT, INT, POINTER, address, bind, find

# What layer.c is written for: so many tokens in a page, and channels in multiples of the longest
# vector, which are multiples of the shorter ones of other CPUs, too.
PAGE = 16
LANES = 16
MAX_ROWS = 32
MAX_HEAD_DIM = 256


class LayerKernels:
    """Their functions over tensors, all FP32 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = bind(
            library.attend,
            *[POINTER] * 3,
            *[INT, POINTER],
            *[INT] * 4,
            *[POINTER] * 5,
            *[INT, FLOAT, INT],
        )
        self._rotate = bind(library.rotate, POINTER, INT, POINTER, POINTER, *[INT] * 6)
        self._add_norm = bind(library.add_norm, *[POINTER] * 4, INT, INT, FLOAT, INT)
        self._multiply = bind(library.multiply, *[POINTER] * 4, *[INT] * 4)
        # Of the vectors of linear.c.
        self.lanes: int = INT.in_dll(library, "lanes").value
        # decoder.c's structures by address: see decoder.py.
        self.decode = bind(library.decode, POINTER, POINTER, INT, POINTER, result=INT)

    def attend(
        self,
        kv: KVStorage,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        slots: Tensor,
        pages: Tensor,
        blocks: Tensor,
        scale: float,
    ) -> Tensor:
        """Store `key` and `value` [T, K, D] in `slots` [T], attend with `query` [T, N, D].

        `pages` and `blocks` as in `NativeStep`. All three may be parts of one tensor.

        Returns:
            [T, N, D], contiguous.
        """
        tokens, num_heads, head_dim = query.shape
        if not _have_one_stride(query, key, value):
            joined = torch.cat((query, key, value), dim=1)
            value_from = num_heads + key.shape[1]
            query, key = joined[:, :num_heads], joined[:, num_heads:value_from]
            value = joined[:, value_from:]
        output = query.new_empty(query.shape)
        self._attend(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            query.stride(0),
            output.data_ptr(),
            tokens,
            num_heads,
            key.shape[1],
            head_dim,
            kv.keys[layer].data_ptr(),
            kv.values[layer].data_ptr(),
            slots.data_ptr(),
            pages.data_ptr(),
            blocks.data_ptr(),
            len(blocks),
            scale,
            torch.get_num_threads(),
        )
        return output

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, is_paired: bool) -> None:
        """Rotate `x` [T, heads, D] in place, by `cos` and `sin` [T, D / 2] of one stride."""
        tokens, heads, head_dim = x.shape
        self._rotate(
            x.data_ptr(),
            x.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.stride(0),
            tokens,
            heads,
            head_dim,
            is_paired,
            torch.get_num_threads(),
        )

    def add_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add `delta` to `hidden` [T, C] in place; its RMS norm. All contiguous, C of lanes."""
        normed = torch.empty_like(hidden)
        self._add_norm(
            hidden.data_ptr(),
            address(delta),
            weight.data_ptr(),
            normed.data_ptr(),
            *hidden.shape,
            eps,
            torch.get_num_threads(),
        )
        return normed

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
        """x W^T + b, [T, out]: `x` [T, in] contiguous, `weight` in linear.c's panels."""
        tokens, depth = x.shape
        result = x.new_empty(tokens, num_outputs)
        self._multiply(
            x.data_ptr(),
            weight.data_ptr(),
            address(bias),
            result.data_ptr(),
            tokens,
            depth,
            num_outputs,
            torch.get_num_threads(),
        )
        return result


def can_attend(kv: KVStorage, num_heads: int) -> bool:
    """Whether layer.c is written for this cache and this many query heads."""
    shape = kv.shape
    return (
        kv.device.type == "cpu"
        and shape.dtype == torch.float32
        and kv.page_size == PAGE
        and shape.head_dim % LANES == 0
        and shape.head_dim <= MAX_HEAD_DIM
        and num_heads // shape.num_kv_heads <= MAX_ROWS
    )


@cache
def find_kernels() -> LayerKernels | None:
    """The kernels for this machine, compiled if need be; None, and a line in the log, if not."""
    return find(LayerKernels, "layers")


def _have_one_stride(query: Tensor, key: Tensor, value: Tensor) -> bool:
    head_dim = query.shape[-1]
    return all(
        tensor.stride(2) == 1
        and tensor.stride(1) == head_dim
        and tensor.stride(0) == query.stride(0)
        for tensor in (query, key, value)
    )
