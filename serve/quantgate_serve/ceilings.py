"""Measures what this device can do: bytes per second of a copy, operations of a matrix product.

Bounded to a fraction of a second, and done once per process: the second engine of a process, and
its tests, read what the first measured.
"""

import functools
from collections.abc import Callable
from time import perf_counter_ns

import torch

from quantgate_serve.roofline import Ceilings

# Two buffers above a CPU's last-level cache, small beside what a model takes next: the most memory
# that a server held is judged.
_CPU_COPY_BYTES = 32 * 1024 * 1024
_CUDA_COPY_BYTES = 512 * 1024 * 1024
_CPU_GEMM = 768
_CUDA_GEMM = 8192
_MAX_S = 0.15
_MIN_RUNS = 3


def measure_ceilings(device: torch.device, dtype: torch.dtype, num_threads: int) -> Ceilings:
    """The best of some runs on `device`. `num_threads` is those that torch uses on a CPU now."""
    return Ceilings(
        bytes_per_s=measure_copy(device, num_threads),
        flops_per_s=_measure_gemm(device, dtype, num_threads),
    )


@functools.cache
def measure_copy(device: torch.device, num_threads: int) -> float:
    """Bytes read and written per second. Called before a model is loaded, where memory counts."""
    size = _CUDA_COPY_BYTES if device.type == "cuda" else _CPU_COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_s = _best_s(lambda: target.copy_(source), device)
    return 2 * size / best_s


@functools.cache
def _measure_gemm(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    width = _CUDA_GEMM if device.type == "cuda" else _CPU_GEMM
    left = torch.ones(width, width, dtype=dtype, device=device)
    product = torch.empty_like(left)
    best_s = _best_s(lambda: torch.mm(left, left, out=product), device)
    return 2 * width**3 / best_s


def forget_buffers(device: torch.device) -> None:
    """Give the buffers back, so that they count neither as free memory missing nor as a peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@torch.inference_mode()
def _best_s(work: Callable[[], object], device: torch.device) -> float:
    """The shortest run: other load on the machine only ever makes one longer."""
    work()
    _wait(device)
    best = float("inf")
    begun = perf_counter_ns()
    runs = 0
    while runs < _MIN_RUNS or perf_counter_ns() - begun < _MAX_S * 1e9:
        started = perf_counter_ns()
        work()
        _wait(device)
        best = min(best, (perf_counter_ns() - started) / 1e9)
        runs += 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
