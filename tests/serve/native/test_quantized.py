"""quantized.c for lesser CPUs computes the same weights, over as many lanes as they have."""

from collections.abc import Callable
from ctypes import CDLL

import pytest
import torch

from quantgate_serve.native.quantized import Codes, Product, QuantizedKernels


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


@pytest.mark.parametrize(("target", "lanes"), [("x86-64", 4), ("x86-64-v3", 8)])
def test_without_avx512_the_weights_are_the_same(
    target: str, lanes: int, library_for: Callable[..., CDLL]
) -> None:
    kernels = QuantizedKernels(library_for(target, "quantized.c"))
    assert kernels.lanes == lanes
    generator = torch.Generator().manual_seed(1)
    for bits in (4, 8):
        product, weights = product_of(bits=bits, lanes=kernels.lanes, generator=generator)
        for rows in (1, 5, 48):
            assert torch.equal(kernels.multiply(product, torch.eye(48)[:rows]), weights[:rows])
