"""int8.c for other CPUs than this one: the same numbers with AVX2, nothing without."""

from collections.abc import Callable
from ctypes import CDLL

import pytest
import torch

from quantgate_serve.fused_int8 import FusedInt8Linear
from quantgate_serve.llm_int8 import Int8Linear
from quantgate_serve.native.int8 import Int8Kernels
from quantgate_serve.native.library import KernelsUnavailableError


def test_a_cpu_without_avx2_is_named(library_for: Callable[..., CDLL]) -> None:
    library = library_for("x86-64", "int8.c")
    with pytest.raises(KernelsUnavailableError, match="needs a CPU with AVX2"):
        Int8Kernels(library)


@pytest.mark.parametrize("num_outliers", [0, 5])
def test_with_avx2_alone_every_bit_is_that_of_torch_s(
    num_outliers: int, library_for: Callable[..., CDLL]
) -> None:
    kernels = Int8Kernels(library_for("x86-64-v3", "int8.c"))
    assert kernels.lanes == 8
    generator = torch.Generator().manual_seed(num_outliers)
    with torch.no_grad():
        for num_in, num_out in ((96, 64), (7, 5), (257, 33)):
            codes = torch.randint(
                -127, 128, (num_out, num_in), generator=generator, dtype=torch.int8
            )
            scales, bias = torch.rand(2, num_out, generator=generator)
            reference = Int8Linear(codes, scales, bias, threshold=6.0)
            x = torch.randn(13, num_in, generator=generator).clamp_(-5.9, 5.9)
            x[3] = 0
            x.view(-1)[:num_outliers] = 9.5
            assert torch.equal(FusedInt8Linear(reference, kernels)(x), reference(x))
