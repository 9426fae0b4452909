"""The measured ceilings: plausible, quick, and measured once."""

from time import perf_counter

import torch

from quantgate_serve.ceilings import measure_ceilings, measure_copy

CPU = torch.device("cpu")


def test_a_cpu_copies_gigabytes_and_computes_gigaflops_within_a_second_once() -> None:
    measure_copy.cache_clear()
    started = perf_counter()
    found = measure_ceilings(CPU, torch.float32, torch.get_num_threads())
    assert perf_counter() - started < 3, "short, also on a busy machine"
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e15
    started = perf_counter()
    assert measure_ceilings(CPU, torch.float32, torch.get_num_threads()) == found
    assert perf_counter() - started < 0.01


def test_another_type_of_arithmetic_is_measured_by_itself() -> None:
    single = measure_ceilings(CPU, torch.float32, torch.get_num_threads())
    double = measure_ceilings(CPU, torch.float64, torch.get_num_threads())
    assert double.bytes_per_s == single.bytes_per_s
    assert double.flops_per_s != single.flops_per_s
