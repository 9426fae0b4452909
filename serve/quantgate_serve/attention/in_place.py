"""Decode attention for the CPU that reads keys and values where they lie.

Gathering the pages of 64 sequences of 160 tokens first costs more than all Linears of a 20 M model:
every byte is read, written and read again. Here the scores are a sampled product (only the slots a
sequence holds are multiplied), and the weighted sum of the values is an embedding bag.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quantgate_serve.kv.storage import KVStorage


@dataclass(frozen=True, slots=True)
class SlotLookup:
    """The slots that each query head of B sequences reads, padded to L.

    `indices` is [B * N, L]. `pattern` says the same as a sparse matrix [B * N, slots of the pool];
    its values are scratch, which each layer overwrites with its scores.
    """

    indices: Tensor
    pattern: Tensor


def can_read_in_place(kv: KVStorage) -> bool:
    """torch has the sampled product on the CPU where it is built with MKL, in FP32 and FP64."""
    is_fp32_on_cpu = kv.device.type == "cpu" and kv.shape.dtype == torch.float32
    return is_fp32_on_cpu and bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def build_lookup(kv: KVStorage, page_rows_BKP: Tensor, *, num_heads: int) -> SlotLookup:
    """`page_rows_BKP` counts (page, key head) pairs, as `DecodeGroup.page_rows` does."""
    count, kv_heads, num_pages = page_rows_BKP.shape
    size = kv.page_size
    length = num_pages * size
    slots = page_rows_BKP.unsqueeze(3) * size + torch.arange(size)
    indices = (
        slots.view(count, kv_heads, 1, length)
        .expand(-1, -1, num_heads // kv_heads, -1)
        .reshape(count * num_heads, length)
        .contiguous()  # one sequence with one key head would stay an expanded view
    )
    pattern = torch.sparse_csr_tensor(
        torch.arange(0, indices.numel() + 1, length),
        indices.view(-1),
        torch.zeros(indices.numel(), dtype=kv.shape.dtype),
        size=(count * num_heads, kv.num_slots),
        check_invariants=False,
    )
    return SlotLookup(indices, pattern)


def attend(
    kv: KVStorage, layer: int, lookup: SlotLookup, query_BND: Tensor, bias: Tensor, *, scale: float
) -> Tensor:
    """One token of each of B sequences: [B, N, D]. `bias` is [B * K, 1, L]."""
    keys, values = kv.by_slot(layer)
    rows = query_BND.reshape(-1, query_BND.shape[-1])
    torch.sparse.sampled_addmm(
        lookup.pattern, rows, keys.t(), beta=0.0, alpha=scale, out=lookup.pattern
    )
    scores = lookup.pattern.values().view(bias.shape[0], -1, bias.shape[2])
    # Not in place: the product multiplies what it overwrites by zero, and 0 * -inf is NaN.
    weights = torch.softmax(scores + bias, dim=-1)
    output = functional.embedding_bag(
        lookup.indices, values, mode="sum", per_sample_weights=weights.view(lookup.indices.shape)
    )
    return output.view(query_BND.shape)
