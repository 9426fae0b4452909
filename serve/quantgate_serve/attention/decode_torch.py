"""Paged decode attention in plain torch: what the Triton kernel must equal, and its stand-in.

Also decides into how many splits the kernel cuts a context.

Shapes: B sequences, N query heads, K key/value heads, D head dim, L tokens, P pages of a table.
Keys and values of a layer are [pages, K, page_size, D]; `table_BP` names pages in order, `length_B`
counts tokens (at least 1). Entries of a table past the length are never read.
"""

import torch
from torch import Tensor

# A split below this many tokens costs more in combining than it gains in parallelism [untested].
_MIN_SPLIT_TOKENS = 256
SPLIT_COUNTS = (1, 2, 4, 8, 16, 32)
# Programs that keep every multiprocessor busy, in multiples of their number.
_WAVES = 2


def choose_splits(batch: int, num_kv_heads: int, max_length: int, num_multiprocessors: int) -> int:
    """Splits of the context, a power of two, so that all multiprocessors have work."""
    wanted = _WAVES * num_multiprocessors // max(1, batch * num_kv_heads)
    possible = max_length // _MIN_SPLIT_TOKENS
    return max(count for count in SPLIT_COUNTS if count == 1 or count <= min(wanted, possible))


def paged_decode_torch(
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

    `num_splits` changes nothing. Gathers every page of the table; sums in FP32.

    Returns:
        [B, N, D] in the type of `query_BND`.
    """
    batch, num_heads, head_dim = query_BND.shape
    num_kv_heads, page_size = keys.shape[1:3]
    # [B, P, K, page, D] -> [B, K, L, D]
    shape = (batch, num_kv_heads, -1, head_dim)
    rows = table_BP.long()
    key_BKLD = keys[rows].transpose(1, 2).reshape(shape).float()
    value_BKLD = values[rows].transpose(1, 2).reshape(shape).float()
    query_BKGD = query_BND.view(batch, num_kv_heads, -1, head_dim).float()
    scores = query_BKGD @ key_BKLD.transpose(2, 3) * scale
    positions = torch.arange(table_BP.shape[1] * page_size, device=query_BND.device)
    is_padding = positions >= length_B.unsqueeze(1)
    scores.masked_fill_(is_padding[:, None, None], float("-inf"))
    # Zero, not whatever lies there: 0 * NaN is NaN.
    value_BKLD = value_BKLD.masked_fill(is_padding[:, None, :, None], 0.0)
    output = torch.softmax(scores, dim=-1) @ value_BKLD
    return output.view(batch, num_heads, head_dim).to(query_BND.dtype)
