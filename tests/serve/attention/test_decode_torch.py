"""The plain-torch decode equals SDPA, and contexts are split where that fills the device."""

import pytest
import torch
from torch.nn import functional

from quantgate_serve.attention.decode_torch import choose_splits, paged_decode_torch


@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_the_reference_equals_sdpa_over_the_tokens_in_order(length: int) -> None:
    torch.manual_seed(length)
    keys, values = torch.randn(2, 6, 2, 16, 8)
    table = torch.tensor([[4, 1, 3]], dtype=torch.int32)
    query = torch.randn(1, 4, 8)
    lengths = torch.tensor([length], dtype=torch.int32)
    ours = paged_decode_torch(query, keys, values, table, lengths, scale=8**-0.5)
    in_order = [
        t[[4, 1, 3]].transpose(0, 1).reshape(1, 2, 48, 8)[:, :, :length] for t in (keys, values)
    ]
    expected = functional.scaled_dot_product_attention(
        query.unsqueeze(2), *in_order, enable_gqa=True
    )
    # FP32 sums of up to 40 products in another order.
    torch.testing.assert_close(ours, expected[:, :, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "length", "expected"),
    [
        (1, 8, 8192, 32),  # 264 programs wanted, 33 per key head, cut to a power of two
        (8, 8, 8192, 4),
        (64, 8, 8192, 1),  # the batch alone fills the device
        (1, 8, 511, 1),  # too short to be worth it
        (1, 8, 512, 2),
        (1, 1, 10**6, 32),
    ],
)
def test_splits_fill_the_device_but_are_never_tiny(
    batch: int, kv_heads: int, length: int, expected: int
) -> None:
    assert choose_splits(batch, kv_heads, length, num_multiprocessors=132) == expected
