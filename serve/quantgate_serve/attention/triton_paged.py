"""Paged decode attention in Triton: split over the context, query heads packed by key head.

Decoding reads each key and value once and computes little with it, so bandwidth decides. The query
heads that share a key head sit in one tile, so that a page is read once for all of them; a long
context is cut into splits, so that a small batch fills the device too. `decode_torch.py` has the
same in plain torch.

Shapes: B sequences, N query heads, K key/value heads, G = N / K, D head dim, P pages of a table,
S splits. Keys and values of a layer are [pages, K, page_size, D]; `table_BP` names pages in order,
`length_B` counts tokens (at least 1). Entries of a table past the length are never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of one tile: four pages, fewer where its keys and values would take more bytes than these.
# Compiled for sm_80 to sm_90 that is 21 to 50 KiB of shared memory; the smaller cards have 99.
_MAX_TILE_TOKENS = 64
_TILE_BYTES = 32 * 1024
# tl.dot wants at least as many on each side.
_MIN_DOT = 16


def tile_tokens(block_d: int, itemsize: int) -> int:
    """Tokens of one tile for heads of `block_d` numbers of `itemsize` bytes."""
    tokens = _MAX_TILE_TOKENS
    while tokens > _MIN_DOT and 2 * tokens * block_d * itemsize > _TILE_BYTES:
        tokens //= 2
    return tokens


def paged_decode(
    query_BND: Tensor,
    keys: Tensor,
    values: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    *,
    scale: float,
    num_splits: int = 1,
) -> Tensor:
    """One new token of each sequence attends to all of its tokens, itself included.

    Args:
        table_BP: int32, `length_B` int32.
        num_splits: a power of two. Splits past the end of a sequence do nothing.

    Returns:
        [B, N, D] in the type of `query_BND`.
    """
    batch, num_heads, head_dim = query_BND.shape
    num_kv_heads, page_size = keys.shape[1:3]
    group = num_heads // num_kv_heads
    output = torch.empty_like(query_BND)
    if num_splits == 1:
        partial, weight = output, query_BND  # not touched
    else:
        shape = (batch, num_heads, num_splits)
        partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=query_BND.device)
        weight = torch.empty(shape, dtype=torch.float32, device=query_BND.device)
    block_d = triton.next_power_of_2(head_dim)
    _attend[(batch, num_kv_heads, num_splits)](
        query_BND,
        keys,
        values,
        table_BP,
        length_B,
        output,
        partial,
        weight,
        scale,
        query_BND.stride(0),
        query_BND.stride(1),
        keys.stride(0),
        keys.stride(1),
        table_BP.stride(0),
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        NUM_SPLITS=num_splits,
        TILE=tile_tokens(block_d, keys.element_size()),
        BLOCK_G=max(_MIN_DOT, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        # FP32 inputs stay FP32: TF32 would round them to 11 bits.
        PRECISION="ieee" if query_BND.dtype == torch.float32 else "tf32",
    )
    if num_splits > 1:
        _combine[(batch, num_heads)](
            partial,
            weight,
            output,
            output.stride(0),
            output.stride(1),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            NUM_SPLITS=num_splits,
            BLOCK_D=block_d,
        )
    return output


# The table is a view at any offset of a step's one upload, as wide as the step's longest sequence:
# compiled for each alignment, the kernel would be compiled in the middle of serving.
@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["table", "length"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    table,
    length,
    output,
    partial,
    weight,
    scale,
    stride_qb,
    stride_qn,
    stride_page,
    stride_head,
    stride_table,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One sequence, one key head, one split: a running softmax over the split's tiles."""
    b = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_tokens = tl.load(length + b)
    tiles = tl.cdiv(tl.cdiv(num_tokens, TILE), NUM_SPLITS)
    first = split * tiles * TILE
    end = tl.minimum(first + tiles * TILE, num_tokens)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + g
    is_head = g < GROUP
    is_dim = d < HEAD_DIM
    q_GD = tl.load(
        query + b * stride_qb + head[:, None] * stride_qn + d[None, :],
        mask=is_head[:, None] & is_dim[None, :],
        other=0.0,
    )
    highest_G = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total_G = tl.zeros((BLOCK_G,), tl.float32)
    sum_GD = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(first, end, TILE):
        n = start + tl.arange(0, TILE)
        is_token = n < end
        page = tl.load(table + b * stride_table + n // PAGE_SIZE, mask=is_token, other=0)
        # 64 bits: a pool beyond 2^31 elements is common.
        row = page.to(tl.int64) * stride_page + kv_head * stride_head + (n % PAGE_SIZE) * HEAD_DIM
        k_DT = tl.load(
            keys + row[None, :] + d[:, None], mask=is_token[None, :] & is_dim[:, None], other=0.0
        )
        score_GT = tl.dot(q_GD, k_DT, input_precision=PRECISION) * scale
        score_GT = tl.where(is_token[None, :], score_GT, float("-inf"))
        higher_G = tl.maximum(highest_G, tl.max(score_GT, axis=1))
        p_GT = tl.exp(score_GT - higher_G[:, None])
        fade_G = tl.exp(highest_G - higher_G)
        v_TD = tl.load(
            values + row[:, None] + d[None, :], mask=is_token[:, None] & is_dim[None, :], other=0.0
        )
        total_G = total_G * fade_G + tl.sum(p_GT, axis=1)
        sum_GD = sum_GD * fade_G[:, None]
        sum_GD += tl.dot(p_GT.to(v_TD.dtype), v_TD, input_precision=PRECISION)
        highest_G = higher_G

    mask = is_head[:, None] & is_dim[None, :]
    if NUM_SPLITS == 1:
        at = b * NUM_HEADS * HEAD_DIM + head[:, None] * HEAD_DIM + d[None, :]
        result = sum_GD / total_G[:, None]
        tl.store(output + at, result.to(output.dtype.element_ty), mask=mask)
    else:
        # An empty split holds no token: sum 0, weight exp(-inf) = 0.
        is_empty = first >= end
        total_G = tl.where(is_empty, 1.0, total_G)
        slot = (b * NUM_HEADS + head) * NUM_SPLITS + split
        tl.store(
            partial + slot[:, None] * HEAD_DIM + d[None, :], sum_GD / total_G[:, None], mask=mask
        )
        tl.store(weight + slot, highest_G + tl.log(total_G), mask=is_head)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    partial,
    weight,
    output,
    stride_ob,
    stride_on,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The splits of one query head, weighted by the log of their softmax sums."""
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    s = tl.arange(0, NUM_SPLITS)
    d = tl.arange(0, BLOCK_D)
    slot = (b * NUM_HEADS + head) * NUM_SPLITS + s
    weight_S = tl.load(weight + slot)
    part_S = tl.exp(weight_S - tl.max(weight_S, axis=0))
    sum_SD = tl.load(
        partial + slot[:, None] * HEAD_DIM + d[None, :], mask=d[None, :] < HEAD_DIM, other=0.0
    )
    result = tl.sum(sum_SD * part_S[:, None], axis=0) / tl.sum(part_S, axis=0)
    at = output + b * stride_ob + head * stride_on + d
    tl.store(at, result.to(output.dtype.element_ty), mask=d < HEAD_DIM)
