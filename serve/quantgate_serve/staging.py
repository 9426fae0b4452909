"""Integers on their way to the device and back, without anybody waiting for a copy.

Two pinned buffers take turns, so that the next step's integers are written while the last copy may
still be running; an event tells when a buffer may be written again. On the CPU nothing is pinned.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.integer]
# Waits for what a step gave: its tokens, and whether all of its numbers were finite.
Arrive = Callable[[], tuple[list[int], bool]]


class Staging:
    """Uploads arrays of integers of 32 bits. One thread uses it."""

    def __init__(self, device: torch.device, *, capacity: int = 65_536) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        # Copies that are sent ahead run here, beside the step that is computed.
        self._beside = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._buffers = [self._allocate(capacity) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def upload(self, arrays: Sequence[Integers]) -> list[Tensor]:
        """The arrays as int32 tensors on the device, ready for work on the current stream.

        On CUDA they are views of one new tensor; the copy does not block.
        """
        buffer = self._write(arrays)
        if self._is_cuda:
            device = buffer.to(self._device, non_blocking=True)
            self._events[self._turn] = _record()
        else:
            device = buffer.clone()
        return _views(device, arrays)

    def send_ahead(self, arrays: Sequence[Integers]) -> list[Tensor]:
        """What upload() gives, copied beside what the current stream computes.

        What comes next in the current stream waits for the copy; the host does not.
        """
        if self._beside is None:
            return self.upload(arrays)
        buffer = self._write(arrays)
        with torch.cuda.stream(self._beside):
            device = buffer.to(self._device, non_blocking=True)
            copied = self._events[self._turn] = _record()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        # Its memory belongs to the other stream: not to be reused while this one reads it.
        device.record_stream(stream)
        return _views(device, arrays)

    def _write(self, arrays: Sequence[Integers]) -> Tensor:
        """The arrays one after another in the buffer whose turn it is."""
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
        return buffer

    def _allocate(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, pin_memory=self._is_cuda)


def download(tokens: Tensor, is_finite: Tensor) -> Arrive:
    """Begin to copy what a step gave, `tokens` [S] and `is_finite` [], to the host."""
    if tokens.device.type != "cuda":
        return lambda: (tokens.tolist(), bool(is_finite))
    given = torch.cat((tokens, is_finite.to(tokens.dtype).view(1)))
    host = torch.empty(given.shape, dtype=given.dtype, pin_memory=True)
    host.copy_(given, non_blocking=True)
    copied = _record()

    def arrive() -> tuple[list[int], bool]:
        copied.synchronize()
        *found, flag = host.tolist()
        return found, bool(flag)

    return arrive


def _record() -> torch.cuda.Event:
    """An event at the end of the current stream."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _views(tensor: Tensor, arrays: Sequence[Integers]) -> list[Tensor]:
    parts = torch.split(tensor, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
