"""Paged attention in plain torch: the reference, and what a CPU without native kernels uses.

Decode reads keys and values in place where it can (`in_place`). Otherwise it gathers the pages of a
group of sequences and multiplies in batches; for 32 sequences of 96 tokens that takes a third of
the time of SDPA over a strided gather.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantgate_serve.attention import in_place, native_paged
from quantgate_serve.attention.interface import AttentionStep, DecodeGroup, PrefillSpan
from quantgate_serve.attention.native_paged import NativeStep


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    quantgate_step: AttentionStep | NativeStep,
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
    head_dim = query.shape[-1]
    output = attend(
        quantgate_step,
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        head_dim**-0.5 if scaling is None else scaling,
    )
    return output.unsqueeze(0), None


def attend(
    step: AttentionStep | NativeStep,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
) -> Tensor:
    """Store `key` and `value` [T, K, D] of this step, attend with `query` [T, N, D]: [T, N, D]."""
    if isinstance(step, NativeStep):
        return native_paged.attend(step, layer, query, key, value, scale)
    head_dim = query.shape[-1]
    # Rows in (token, head) order, as slot_rows counts them.
    step.kv.write(layer, step.slot_rows, key.reshape(-1, head_dim), value.reshape(-1, head_dim))
    parts = [_decode(step, group, query, layer=layer, scale=scale) for group in step.decodes]
    if step.prefills:
        by_head = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
        parts += [
            _prefill(step, span, *by_head, layer=layer, scale=scale) for span in step.prefills
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(
    step: AttentionStep, group: DecodeGroup, query_TND: Tensor, *, layer: int, scale: float
) -> Tensor:
    """One token of each of B sequences: [B, N, D]."""
    query_BND = query_TND[group.start : group.start + group.count]
    if group.lookup is not None:
        return in_place.attend(step.kv, layer, group.lookup, query_BND, group.bias, scale=scale)
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
