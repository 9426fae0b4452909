"""Memory in pages of 2 MiB, where the kernel has them: a step reads all weights and many KV pages.

With pages of 4 KiB a core spends much of that time on translating addresses, above all in a virtual
machine. Nothing here can fail: memory that gets no huge pages works as before.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from quantgate_serve.linear import PackedLinear

_HUGE = 2 * 2**20
# Linux 6.1 and later: move what is there into huge pages now. Python's mmap does not name it.
_MADV_COLLAPSE = 25


def zeros(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU that asks for huge pages before it is first touched."""
    num_bytes = prod(size) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or num_bytes < _HUGE:
        return torch.zeros(tuple(size), dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return torch.zeros(tuple(size), dtype=dtype)
    # Touched now, not by the first requests: what does not fit fails here.
    return torch.frombuffer(memory, dtype=dtype).view(tuple(size)).zero_()


def collapse_weights(model: nn.Module) -> int:
    """Move packed weights and codes of `model` into huge pages; how many 2 MiB were moved."""
    moved = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            start = int(torch.ops.mkldnn.data_ptr(module.weight))
            end = start + int(torch.ops.mkldnn._nbytes(module.weight))
        elif isinstance(codes := getattr(module, "codes", None), Tensor):  # a quantized Linear
            start = codes.data_ptr()
            end = start + codes.nbytes
        else:
            continue
        for address in range(start // _HUGE * _HUGE, end, _HUGE):
            moved += _collapse(address)
    return moved


def _collapse(address: int) -> bool:
    """False where part of the 2 MiB is not mapped, or the kernel cannot."""
    madvise = _find_madvise()
    return madvise is not None and madvise(address, _HUGE, _MADV_COLLAPSE) == 0


@cache
def _find_madvise() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
