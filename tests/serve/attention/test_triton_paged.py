"""The Triton kernel gives what plain torch gives; without a GPU through Triton's interpreter
(tests/serve/conftest.py switches it on).

Interpreted, the kernel's arithmetic, masks and addresses are tested, not its compilation or speed.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[triton]")

from quantgate_serve.attention.decode_torch import paged_decode_torch
from quantgate_serve.attention.triton_paged import paged_decode, tile_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16
# FP32: both sum in FP32, in another order; outputs are of size 1, and 1e-5 is some 80 roundings.
# FP16 and BF16: weights are rounded before they meet the values, so half a unit of their last
# place (2^-11, 2^-8) of a value of size 1, twice, and once more for the output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def decode_both(
    lengths: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    splits: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Kernel and reference over a shuffled pool whose unused slots are NaN."""
    source = torch.Generator().manual_seed(sum(lengths) + dim)
    counts = [-(-length // PAGE) for length in lengths]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=source).tolist()
    shape = (num_pages, kv_heads, PAGE, dim)
    keys = torch.full(shape, float("nan"))
    values = torch.full(shape, float("nan"))
    # Past the end a table holds anything that is a page.
    table = torch.randint(0, num_pages, (len(lengths), max(counts) + 2), generator=source)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for index in range(count):
            page = order.pop()
            table[row, index] = page
            used = min(PAGE, length - index * PAGE)
            keys[page, :, :used] = torch.randn(kv_heads, used, dim, generator=source)
            values[page, :, :used] = torch.randn(kv_heads, used, dim, generator=source)
    query = torch.randn(len(lengths), heads, dim, generator=source)
    arguments: list[Any] = [query.to(dtype), keys.to(dtype), values.to(dtype)]
    arguments += [table.int(), torch.tensor(lengths, dtype=torch.int32)]
    arguments = [tensor.to(DEVICE) for tensor in arguments]
    ours = paged_decode(*arguments, scale=dim**-0.5, num_splits=splits)
    return ours, paged_decode_torch(*arguments, scale=dim**-0.5)


def assert_close(ours: Tensor, reference: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    assert torch.isfinite(reference).all()
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=0)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 129])
@pytest.mark.parametrize("splits", [1, 4])
def test_every_length_around_pages_and_tiles(length: int, splits: int) -> None:
    assert_close(*decode_both([length], splits=splits))


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_every_head_dim(dim: int) -> None:
    assert_close(*decode_both([33, 70], dim=dim, splits=2))


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (6, 2), (8, 1), (12, 4), (32, 1), (40, 2)]
)
def test_every_grouping_of_heads(heads: int, kv_heads: int) -> None:
    assert_close(*decode_both([40, 3], heads=heads, kv_heads=kv_heads, splits=2))


def test_a_batch_of_very_different_lengths_with_splits_that_stay_empty() -> None:
    assert_close(*decode_both([1, 300, 16, 130, 2], heads=2, kv_heads=1, splits=8))


@pytest.mark.parametrize("splits", [1, 2, 8, 32])
def test_the_number_of_splits_does_not_matter(splits: int) -> None:
    assert_close(*decode_both([300], heads=2, kv_heads=1, splits=splits))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(),
                reason="Triton's interpreter multiplies the bits of BF16 as if they were integers",
            ),
        ),
    ],
)
def test_low_precision_stays_within_its_rounding(dtype: torch.dtype) -> None:
    assert_close(*decode_both([100, 17], dtype=dtype, splits=2))


@pytest.mark.parametrize(
    ("dim", "itemsize", "expected"),
    [(64, 2, 64), (128, 2, 64), (256, 2, 32), (128, 4, 32), (256, 4, 16)],
)
def test_tiles_shrink_where_heads_are_wide(dim: int, itemsize: int, expected: int) -> None:
    assert tile_tokens(dim, itemsize) == expected
