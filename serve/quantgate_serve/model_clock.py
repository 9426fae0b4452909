"""Times the model's part of a step, whatever device computes it."""

from time import perf_counter_ns
from types import TracebackType
from typing import Any

import torch


class ModelClock:
    """Times the model's part of a step: `with clock: model(...)`.

    On CUDA between two events, from the first kernel's start to the last one's end, without
    waiting for either; gaps between kernels count as the model's. On a CPU kernels are calls.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._started_ns = 0
        self._elapsed_ns = 0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self._is_cuda:
            first, last = _timer(), _timer()
            first.record()
            self._events.append((first, last))
        else:
            self._started_ns = perf_counter_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_cuda:
            self._events[-1][1].record()
        else:
            self._elapsed_ns += perf_counter_ns() - self._started_ns

    def take_s(self) -> float:
        """Seconds since the last call, of the parts that have ended; asks for no result."""
        ended = [pair for pair in self._events if pair[1].query()]
        self._events = [pair for pair in self._events if pair not in ended]
        elapsed_s: float = sum(first.elapsed_time(last) for first, last in ended) / 1e3
        elapsed_s += self._elapsed_ns / 1e9
        self._elapsed_ns = 0
        return elapsed_s


def _timer() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
