"""Paged attention on CUDA: the Triton kernel for decodes, one varlen call for all prompt chunks.

The step's facts are flat tensors of 32 bits that one copy brings to the device (`staging.py`).
Where varlen attention does not run (FP32, an old card, no CUDA), each chunk goes through SDPA.

Shapes as in `interface.py`; C chunks of prompts, Q their tokens of this step, L all their tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from quantgate_serve.kv.storage import KVStorage

ATTENTION_NAME = "quantgate_cuda"
Decode = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """The first B tokens of a step: one of each sequence that decodes."""

    table_BP: Tensor
    length_B: Tensor
    num_splits: int


@dataclass(frozen=True, slots=True)
class PackedPrompts:
    """The other tokens of a step: C chunks of prompts, one after another.

    `ends_Q` and `ends_L` [C + 1] are cumulative counts of new and of all tokens. `page_L` and
    `offset_L` say where all tokens lie; None while no chunk has any before it.
    """

    ends_Q: Tensor
    ends_L: Tensor
    lengths: tuple[tuple[int, int], ...]  # (new, all) of each chunk
    page_L: Tensor | None
    offset_L: Tensor | None


@dataclass(frozen=True, slots=True)
class CudaStep:
    """What attention needs to know about one step. `slot_rows` is [T * K]."""

    kv: KVStorage
    slot_rows: Tensor
    decode: Decode
    decodes: DecodeBatch | None
    prompts: PackedPrompts | None


def cuda_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    quantgate_step: CudaStep,
    **_: Any,
) -> tuple[Tensor, None]:
    """Store this step's keys and values, attend over the cache.

    Args:
        query: [1, N, T, D]; `key` and `value` [1, K, T, D].

    Returns:
        [1, T, N, D] and no weights.
    """
    step = quantgate_step
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scaling is None else scaling
    query_TND, key_TKD, value_TKD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    step.kv.write(
        layer,
        step.slot_rows,
        key_TKD.reshape(-1, head_dim),
        value_TKD.reshape(-1, head_dim),
    )
    parts = []
    count = 0
    if step.decodes is not None:
        count = len(step.decodes.length_B)
        parts.append(
            step.decode(
                query_TND[:count].contiguous(),
                step.kv.keys[layer],
                step.kv.values[layer],
                step.decodes.table_BP,
                step.decodes.length_B,
                scale=scale,
                num_splits=step.decodes.num_splits,
            )
        )
    if step.prompts is not None:
        prompts = step.prompts
        if prompts.page_L is None:
            all_keys, all_values = key_TKD[count:], value_TKD[count:]
        else:
            # [L, K, D]: the pages hold this step's tokens by now, too.
            all_keys = step.kv.keys[layer][prompts.page_L, :, prompts.offset_L]
            all_values = step.kv.values[layer][prompts.page_L, :, prompts.offset_L]
        attend = _varlen if can_run_varlen(query) else _chunk_by_chunk
        parts.append(attend(query_TND[count:], all_keys, all_values, prompts, scale=scale))
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output.unsqueeze(0), None


def can_run_varlen(query: Tensor) -> bool:
    """FlashAttention-2, which is behind varlen attention, wants half precision and Ampere."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _has_varlen()
    )


@cache
def _has_varlen() -> bool:
    """Whether this torch has varlen attention with a window and grouped heads (2.13 has)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= set(signature(varlen_attn).parameters)


def _varlen(
    query_QND: Tensor, key_LKD: Tensor, value_LKD: Tensor, prompts: PackedPrompts, *, scale: float
) -> Tensor:
    """All chunks in one kernel. Its causal mask is aligned to the last token [untested]."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query_QND.contiguous(),
        key_LKD.contiguous(),
        value_LKD.contiguous(),
        prompts.ends_Q,
        prompts.ends_L,
        max(new for new, _ in prompts.lengths),
        max(total for _, total in prompts.lengths),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query_QND.shape[1] != key_LKD.shape[1],
    )
    return cast(Tensor, output)


def _chunk_by_chunk(
    query_QND: Tensor, key_LKD: Tensor, value_LKD: Tensor, prompts: PackedPrompts, *, scale: float
) -> Tensor:
    grouped = query_QND.shape[1] != key_LKD.shape[1]
    outputs = []
    at_q = at_l = 0
    for new, total in prompts.lengths:
        outputs.append(
            functional.scaled_dot_product_attention(
                query_QND[at_q : at_q + new].transpose(0, 1).unsqueeze(0),
                key_LKD[at_l : at_l + total].transpose(0, 1).unsqueeze(0),
                value_LKD[at_l : at_l + total].transpose(0, 1).unsqueeze(0),
                attn_mask=None if new == total else causal_lower_right(new, total),
                is_causal=new == total,
                scale=scale,
                enable_gqa=grouped,
            )[0].transpose(0, 1)
        )
        at_q += new
        at_l += total
    return torch.cat(outputs)
