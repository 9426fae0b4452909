"""quantized.c for lesser CPUs computes the same weights, and is done without where it must be."""

import logging
import platform
import shutil
from pathlib import Path

import pytest
import torch

from quantgate_serve.native import library, quantized
from quantgate_serve.native.library import KernelsUnavailableError, build_library
from quantgate_serve.native.quantized import (
    Codes,
    Product,
    QuantizedKernels,
    find_quantized_kernels,
)

needs_x86 = pytest.mark.skipif(
    shutil.which("cc") is None or platform.machine() != "x86_64", reason="no C compiler for x86-64"
)


def product_of(
    *, bits: int, lanes: int, generator: torch.Generator
) -> tuple[Product, torch.Tensor]:
    """48 inputs in groups of 16, two tiles of outputs; and the weights [in, out] they mean."""
    codes = torch.randint(0, 1 << bits, (2, 48, lanes), generator=generator)
    zeros = torch.randint(0, 1 << bits, (2, 3, lanes), generator=generator)
    # Down to FP16 numbers without an exponent of their own.
    sizes = 10.0 ** -torch.arange(lanes).clamp(max=7)
    scales = (torch.randn(2, 3, lanes, generator=generator) * sizes).half()
    # Format v1 stores a zero point minus one.
    weights = (codes - zeros.repeat_interleave(16, 1) - 1) * scales.float().repeat_interleave(16, 1)
    each = 32 // bits
    words = (codes.view(2, -1, each, lanes) << (torch.arange(each) * bits).view(-1, 1)).sum(2)
    part = Codes(
        num_in=48,
        num_out=2 * lanes,
        group=16,
        codes=(words - ((words >> 31) << 32)).int(),
        scales=scales,
        zeros=zeros.to(torch.uint8),
        zero_offset=1,
        values=torch.arange(16.0) if bits == 4 else None,
    )
    order = torch.randperm(48, generator=generator)
    columns = torch.empty(48, 2 * lanes)
    columns[order] = weights.transpose(0, 1).reshape(48, 2 * lanes)
    return Product([part], order=order, is_gated=False), columns


@needs_x86
@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3"])
def test_without_avx512_the_weights_are_the_same(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    flags = [f"-march={target}" if flag == "-march=native" else flag for flag in library._FLAGS]
    monkeypatch.setattr(library, "_FLAGS", tuple(flags))
    kernels = QuantizedKernels(build_library("cc", tmp_path, quantized.SOURCE))
    generator = torch.Generator().manual_seed(1)
    for bits in (4, 8):
        product, weights = product_of(bits=bits, lanes=kernels.lanes, generator=generator)
        for rows in (1, 5, 48):
            assert torch.equal(kernels.multiply(product, torch.eye(48)[:rows]), weights[:rows])


def test_without_a_compiler_there_are_no_kernels_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    find_quantized_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert find_quantized_kernels() is None
    finally:
        find_quantized_kernels.cache_clear()
    assert "no native kernels for quantized Linears, torch computes instead" in caplog.text


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "quantized.so"
    path.write_text("no library", encoding="utf-8")
    with pytest.raises(KernelsUnavailableError, match="cannot be loaded"):
        QuantizedKernels(path)
