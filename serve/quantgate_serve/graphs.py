"""Decode steps recorded once per batch size, and replayed without Python or launches.

A step of B sequences runs in the smallest recorded batch that holds it; the rows left over repeat
its first sequence, so that they read and write what is read and written anyway. Which steps can be
replayed is decided here; what a step computes is the runner's.

Shapes: B sequences, P pages of a table, K key/value heads, V vocabulary.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantgate_serve.kernels import Kernel
from quantgate_serve.metrics import EngineMetrics

_log = logging.getLogger(__name__)
# Up to 8 each power of two, then each multiple of 8: at most a third of a batch is padding.
_DENSE_FROM = 8


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """All that a decode step reads, on the device: a row [2 + P] of int32 for each sequence.

    Its token, its position, its pages. One tensor, so that one copy brings it into a recording.
    """

    rows_BW: Tensor

    @property
    def ids_B(self) -> Tensor:
        return self.rows_BW[:, 0]

    @property
    def position_B(self) -> Tensor:
        return self.rows_BW[:, 1]

    @property
    def table_BP(self) -> Tensor:
        return self.rows_BW[:, 2:]

    def __len__(self) -> int:
        return self.rows_BW.shape[0]


# Computes logits [B, V] of a decode step.
Forward = Callable[[DecodeInputs], Tensor]
# Records what a call of the forward does with its inputs: returns how to repeat it, and its output.
Capture = Callable[[Forward, DecodeInputs], tuple[Callable[[], None], Tensor]]


def batch_sizes(largest: int) -> list[int]:
    """The sizes to record for batches of up to `largest` sequences, ascending."""
    small = [size for size in (1, 2, 4, 8) if size < largest]
    return [*small, *range(2 * _DENSE_FROM, largest, _DENSE_FROM), largest]


def why_not(kernels: Iterable[Kernel]) -> str | None:
    """Why the model's Linears cannot be recorded, None if they can."""
    for kernel in kernels:
        if kernel.uncapturable is not None:
            return f"{kernel.name}: {kernel.uncapturable}"
    return None


class DecodeGraphs:
    """The recorded batch sizes of one model, and how often they were of use."""

    def __init__(
        self,
        forward: Forward,
        empty_inputs: Callable[[int], DecodeInputs],
        metrics: EngineMetrics,
        *,
        sizes: Sequence[int],
        capture: Capture,
    ) -> None:
        """Records nothing yet.

        Args:
            empty_inputs: for a batch size, inputs that can be computed (on pages of nobody).
            sizes: ascending.
        """
        self._forward = forward
        self._empty_inputs = empty_inputs
        self._metrics = metrics
        self._sizes = list(sizes)
        self._capture = capture
        self._recorded: dict[int, tuple[DecodeInputs, Callable[[], None], Tensor]] = {}

    def record(self) -> None:
        """Record every size, largest first, so that the smaller ones share its memory.

        A model that cannot be recorded is served without graphs, and the log says why.
        """
        for size in reversed(self._sizes):
            inputs = self._empty_inputs(size)
            try:
                replay, output = self._capture(self._forward, inputs)
            except RuntimeError as error:
                _log.warning("no CUDA graphs, recording a batch of %d failed: %s", size, error)
                self._recorded.clear()
                self._sizes.clear()
                return
            self._recorded[size] = (inputs, replay, output)

    def run(self, inputs: DecodeInputs) -> Tensor | None:
        """Logits [B, V] of a step, valid until the next call; None where no graph fits."""
        batch = len(inputs)
        index = bisect_left(self._sizes, batch)
        if index == len(self._sizes):
            self.count_miss("batch too large" if self._recorded else "not recorded")
            return None
        size = self._sizes[index]
        static, replay, output = self._recorded[size]
        _fill(static.rows_BW, inputs.rows_BW)
        replay()
        self._metrics.graph_hits = (self._metrics.graph_hits or 0) + 1
        return output[:batch]

    def count_miss(self, reason: str) -> None:
        if self._metrics.graph_misses is not None:
            self._metrics.graph_misses[reason] += 1


def capture_on_cuda(forward: Forward, inputs: DecodeInputs) -> tuple[Callable[[], None], Tensor]:
    """Record with torch.cuda.CUDAGraph in torch's shared pool [untested without a GPU]."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Libraries set themselves up and Triton compiles in the first calls, which no graph may.
        for _ in range(2):
            forward(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        output = forward(inputs)
    return graph.replay, output


@cache
def _pool() -> Any:
    """One memory pool for all graphs: they never run at the same time."""
    return torch.cuda.graph_pool_handle()


def _fill(target_SW: Tensor, source_BW: Tensor) -> None:
    """Copy all sequences into the first rows of the target, and the first one into the rest."""
    batch, width = source_BW.shape
    target_SW[:batch, :width].copy_(source_BW)
    if batch < len(target_SW):
        target_SW[batch:, :width].copy_(source_BW[:1].expand(len(target_SW) - batch, -1))
