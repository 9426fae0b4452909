"""Round-to-nearest quantizers that write each scheme's tensors, to plant faults with.

No calibration, no kernels: what comes out is a healthy artifact of the scheme as rounding makes it.
All take FP32 [out, in] and return the tensors of one module by the ends of their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from quantgate.audit.rounding import NF4_CODES, dynamic_map

Rounding: TypeAlias = Callable[[Tensor], Tensor]

NF4_BLOCK = 64
_NESTED_BLOCK = 256


def pack_gptq(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    zero_offset: int = 1,
    group_of: Tensor | None = None,
    rounding: Rounding = torch.round,
) -> dict[str, Tensor]:
    """AutoGPTQ tensors, symmetric.

    Args:
        zero_offset: 1 for version 1 of the format, 0 for version 2.
        group_of: [in] the group of each input; None for consecutive groups.
        rounding: to whole codes; `torch.floor` is a fault.
    """
    num_out, num_in = weight.shape
    if group_of is None:
        group_of = torch.arange(num_in) // group_size
    num_groups = int(group_of.max()) + 1
    absmax = torch.stack([weight[:, group_of == g].abs().amax(dim=1) for g in range(num_groups)])
    scales = (absmax * 2 / (2**bits - 1)).half()
    middle = 2 ** (bits - 1)
    each = scales.float()[group_of].clamp(min=1e-12)  # [in, out]
    codes = (rounding(weight.t() / each) + middle).clamp(0, 2**bits - 1).int()
    zeros = torch.full((num_groups, num_out), middle - zero_offset, dtype=torch.int32)
    return {
        "qweight": pack_words(codes, bits),
        "qzeros": pack_words(zeros.t().contiguous(), bits).t().contiguous(),
        "scales": scales,
        "g_idx": group_of.int(),
    }


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int32 [rows * bits / 32, columns] of codes [rows, columns], lowest bits first."""
    per_word = 32 // bits
    grouped = codes.int().view(-1, per_word, codes.shape[1])
    words = torch.zeros(len(grouped), codes.shape[1], dtype=torch.int32)
    for place in range(per_word):
        words |= grouped[:, place] << (place * bits)
    return words


def pack_nf4(
    weight: Tensor, *, is_double_quantized: bool = True, rounding_up: bool | None = None
) -> dict[str, Tensor]:
    """bitsandbytes NF4 tensors.

    Args:
        rounding_up: None for the nearest code; False for always the next lower one, a fault.
    """
    flat = weight.reshape(-1)
    if len(flat) % NF4_BLOCK:
        raise ValueError(f"{len(flat)} weights are no multiple of {NF4_BLOCK}")
    blocks = flat.view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    codes = torch.tensor(NF4_CODES)
    scaled = blocks / absmax.clamp(min=1e-12).unsqueeze(1)
    bounds = codes[1:] if rounding_up is False else (codes[1:] + codes[:-1]) / 2
    index = torch.bucketize(scaled, bounds, right=rounding_up is False).to(torch.uint8).flatten()
    parts = {
        "weight": (index[0::2] << 4 | index[1::2]).unsqueeze(1),
        "weight.quant_map": codes,
    }
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    if is_double_quantized:
        offset = float(absmax.mean())
        count = math.ceil(len(absmax) / _NESTED_BLOCK)
        padded = torch.zeros(count * _NESTED_BLOCK)
        padded[: len(absmax)] = absmax - offset
        nested = padded.view(count, _NESTED_BLOCK)
        scale = nested.abs().amax(dim=1).clamp(min=1e-12)
        table = dynamic_map().clone()
        nearest = torch.bucketize(nested / scale.unsqueeze(1), (table[1:] + table[:-1]) / 2)
        parts |= {
            "weight.absmax": nearest.flatten()[: len(absmax)].to(torch.uint8),
            "weight.nested_absmax": scale,
            "weight.nested_quant_map": table,
        }
        state |= {
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    else:
        parts["weight.absmax"] = absmax
    data = json.dumps(state).encode("utf-8")
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(data), dtype=torch.uint8)
    return parts


def pack_int8(weight: Tensor, *, rounding: Rounding = torch.round) -> dict[str, Tensor]:
    """bitsandbytes LLM.int8() tensors."""
    largest = weight.abs().amax(dim=1)
    codes = rounding(weight * (127 / largest.clamp(min=1e-12)).unsqueeze(1)).clamp(-127, 127)
    return {
        "weight": codes.to(torch.int8),
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
