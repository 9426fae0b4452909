"""Paged attention in plain torch: the reference, and the CPU's only backend.

Decode gathers the pages of a group of sequences and multiplies in batches; for 32 sequences of 96
tokens that takes a third of the time of SDPA over a strided gather.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantgate_serve.attention.interface import AttentionStep, DecodeGroup, PrefillSpan


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    quantgate_step: AttentionStep,
    **_: Any,
) -> tuple[Tensor, None]:
    """Store this step's keys and values, attend over the cache.

    Other arguments are ignored: `architecture.probe` has refused a model that passes one that would
    change the result.

    Args:
        query: [1, N, T, D]; `key` and `value` [1, K, T, D].

    Returns:
        [1, T, N, D] and no weights.
    """
    step = quantgate_step
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scaling is None else scaling
    query_TND = query[0].transpose(0, 1)
    # Rows in (token, head) order, as slot_rows counts them.
    step.kv.write(
        layer,
        step.slot_rows,
        key[0].transpose(0, 1).reshape(-1, head_dim),
        value[0].transpose(0, 1).reshape(-1, head_dim),
    )
    parts = [_decode(step, group, query_TND, layer=layer, scale=scale) for group in step.decodes]
    parts += [
        _prefill(step, span, query, key, value, layer=layer, scale=scale) for span in step.prefills
    ]
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output.unsqueeze(0), None


def _decode(
    step: AttentionStep, group: DecodeGroup, query_TND: Tensor, *, layer: int, scale: float
) -> Tensor:
    """One token of each of B sequences: [B, N, D]."""
    query_BND = query_TND[group.start : group.start + group.count]
    num_heads, head_dim = query_BND.shape[1:]
    keys, values = step.kv.gather(layer, group.page_rows, num_sequences=group.count)
    # [B * K, N / K, D]: the query heads that share a key head become rows of one product.
    rows = query_BND.reshape(keys.shape[0], -1, head_dim)
    scores = torch.baddbmm(group.bias, rows, keys.transpose(1, 2), alpha=scale)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values).view(group.count, num_heads, head_dim)


def _prefill(
    step: AttentionStep,
    span: PrefillSpan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layer: int,
    scale: float,
) -> Tensor:
    """A chunk of one sequence's prompt: [length, N, D]."""
    end = span.start + span.length
    query_1NTD = query[:, :, span.start : end]
    grouped = query.shape[1] != key.shape[1]
    if span.page_rows is None:
        output = functional.scaled_dot_product_attention(
            query_1NTD,
            key[:, :, span.start : end],
            value[:, :, span.start : end],
            is_causal=True,
            scale=scale,
            enable_gqa=grouped,
        )
    else:
        keys, values = step.kv.gather(layer, span.page_rows, num_sequences=1)
        output = functional.scaled_dot_product_attention(
            query_1NTD,
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=span.mask,
            scale=scale,
            enable_gqa=grouped,
        )
    return output[0].transpose(0, 1)
