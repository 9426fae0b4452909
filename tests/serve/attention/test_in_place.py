"""Attention over keys and values in place gives what gathering them gives."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate_serve.attention import in_place, torch_paged
from quantgate_serve.attention.interface import AttentionStep, DecodeGroup
from quantgate_serve.kv.storage import KVShape, KVStorage

HEAD_DIM = 8
PAGE_SIZE = 4


def make_storage(kv_heads: int, seed: int) -> KVStorage:
    storage = KVStorage(
        KVShape(2, kv_heads, HEAD_DIM, torch.float32),
        num_pages=12,
        page_size=PAGE_SIZE,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*storage.keys, *storage.values]:
        tensor[:-1] = torch.randn(tensor[:-1].shape, generator=generator)
    return storage


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 3 * PAGE_SIZE), min_size=1, max_size=4),
    kv_heads=st.sampled_from([1, 2]),
    sharing=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_in_place_equals_gathered_attention(
    lengths: list[int], kv_heads: int, sharing: int, seed: int
) -> None:
    kv = make_storage(kv_heads, seed)
    generator = torch.Generator().manual_seed(seed)
    num_pages = -(-max(lengths) // PAGE_SIZE)
    table = torch.full((len(lengths), num_pages), kv.null_page)
    free = torch.randperm(kv.num_pages, generator=generator).tolist()
    for row, length in enumerate(lengths):
        for page in range(-(-length // PAGE_SIZE)):
            table[row, page] = free.pop()
    rows = (table * kv_heads).unsqueeze(1) + torch.arange(kv_heads).view(1, -1, 1)
    is_padding = torch.arange(num_pages * PAGE_SIZE) >= torch.tensor(lengths).unsqueeze(1)
    bias = torch.zeros(is_padding.shape).masked_fill_(is_padding, float("-inf"))
    bias = bias.repeat_interleave(kv_heads, dim=0).unsqueeze(1)
    num_heads = kv_heads * sharing
    query = torch.randn(len(lengths), num_heads, HEAD_DIM, generator=generator)
    lookup = in_place.build_lookup(kv, rows, num_heads=num_heads)
    group = DecodeGroup(0, len(lengths), rows.reshape(-1), bias)
    step = AttentionStep(kv, torch.empty(0), (group,), ())
    # Twice over both layers: a layer's scores must not reach into the next one's.
    for layer in (0, 1, 0, 1):
        expected = torch_paged._decode(step, group, query, layer=layer, scale=0.3)
        found = in_place.attend(kv, layer, lookup, query, bias, scale=0.3)
        assert torch.allclose(found, expected, atol=1e-5)


def test_only_fp32_on_the_cpu_is_read_in_place() -> None:
    half = KVStorage(
        KVShape(1, 1, HEAD_DIM, torch.bfloat16),
        num_pages=1,
        page_size=PAGE_SIZE,
        device=torch.device("cpu"),
    )
    assert not in_place.can_read_in_place(half)
    assert in_place.can_read_in_place(make_storage(1, 0))
