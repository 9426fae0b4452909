"""One copy brings all of a step's integers to the device.

Two pinned buffers take turns, so that the next step's integers are written while the last copy may
still be running; an event tells when a buffer may be written again. On the CPU nothing is pinned.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.integer]


class Staging:
    """Uploads arrays of integers of 32 bits. One thread uses it."""

    def __init__(self, device: torch.device, *, capacity: int = 65_536) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._buffers = [self._allocate(capacity) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def upload(self, arrays: Sequence[Integers]) -> list[Tensor]:
        """The arrays as int32 tensors on the device, ready for work on the current stream.

        On CUDA they are views of one new tensor; the copy does not block.
        """
        self._turn = 1 - self._turn
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        total = sum(array.size for array in arrays)
        if total > self._buffers[self._turn].numel():
            self._buffers[self._turn] = self._allocate(2 * total)
        buffer = self._buffers[self._turn][:total]
        target = buffer.numpy()
        at = 0
        for array in arrays:
            target[at : at + array.size] = array.reshape(-1)
            at += array.size
        if self._is_cuda:
            device = buffer.to(self._device, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            self._events[self._turn] = done
        else:
            device = buffer.clone()
        parts = torch.split(device, [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def _allocate(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, pin_memory=self._is_cuda)
