"""A step's integers as plain torch's attention wants them: groups of decodes, spans of prompts."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantgate_serve.attention.in_place import build_lookup
from quantgate_serve.attention.interface import AttentionStep, DecodeGroup, PrefillSpan
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.step_inputs import StepInputs

# A group of decodes is split where padding would read this many times the pages it needs.
_MAX_PADDING = 1.6
_MIN_GROUP = 8


def build_step(
    kv: KVStorage, inputs: StepInputs, *, num_heads: int, reads_in_place: bool
) -> AttentionStep:
    """The step over `inputs`, whose decodes come in order of length."""
    size, count = kv.page_size, inputs.num_decodes
    page_counts = (inputs.starts[:count] // size + 1).tolist()
    slot_rows = _rows_of(kv, inputs.slots // size) * size
    slot_rows += torch.from_numpy(inputs.slots % size).unsqueeze(1)
    return AttentionStep(
        kv=kv,
        slot_rows=slot_rows.reshape(-1).to(kv.device),
        decodes=tuple(
            _group(
                kv,
                inputs,
                first,
                end,
                num_pages=page_counts[end - 1],
                num_heads=num_heads if reads_in_place else None,
            )
            for first, end in split_by_length(page_counts)
        ),
        prefills=tuple(_span(kv, inputs, index) for index in range(count, len(inputs.starts))),
    )


def split_by_length(page_counts: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of the ascending `page_counts` to gather together, so that padding stays small."""
    count = len(page_counts)
    if count == 0:
        return []
    pages = np.asarray(page_counts)
    if count >= 2 * _MIN_GROUP and count * pages[-1] > _MAX_PADDING * pages.sum():
        sizes = np.arange(_MIN_GROUP, count - _MIN_GROUP + 1)
        cost = sizes * pages[sizes - 1] + (count - sizes) * pages[-1]
        middle = int(sizes[cost.argmin()])
        upper = split_by_length(page_counts[middle:])
        return split_by_length(page_counts[:middle]) + [
            (first + middle, end + middle) for first, end in upper
        ]
    return [(0, count)]


def _group(
    kv: KVStorage,
    inputs: StepInputs,
    first: int,
    end: int,
    *,
    num_pages: int,
    num_heads: int | None,
) -> DecodeGroup:
    """Decodes `first` to `end`; with `num_heads` they are looked up in place, too."""
    table = inputs.table[inputs.rows[first:end], :num_pages].astype(np.int64)
    # [B, K, P]: for each sequence and head the rows of its pages.
    rows = _rows_of(kv, table).transpose(1, 2).contiguous()
    lengths = inputs.starts[first:end, None] + 1
    is_padding = np.arange(num_pages * kv.page_size) >= lengths
    bias = torch.zeros(is_padding.shape, dtype=kv.shape.dtype)
    bias.masked_fill_(torch.from_numpy(is_padding), float("-inf"))
    lookup = None if num_heads is None else build_lookup(kv, rows, num_heads=num_heads)
    return DecodeGroup(
        start=first,
        count=end - first,
        page_rows=rows.reshape(-1).to(kv.device),
        bias=bias.repeat_interleave(kv.shape.num_kv_heads, dim=0).unsqueeze(1).to(kv.device),
        lookup=lookup,
    )


def _span(kv: KVStorage, inputs: StepInputs, index: int) -> PrefillSpan:
    start, length = int(inputs.starts[index]), int(inputs.lengths[index])
    first = int(inputs.firsts[index])
    if start == 0:
        return PrefillSpan(first, length, None, None)
    num_pages = -(-(start + length) // kv.page_size)
    held = inputs.table[inputs.rows[index], :num_pages].astype(np.int64)
    rows = _rows_of(kv, held).t().reshape(-1)  # head by head
    mask = np.arange(num_pages * kv.page_size) <= inputs.positions[first : first + length, None]
    return PrefillSpan(first, length, rows.to(kv.device), torch.from_numpy(mask).to(kv.device))


def _rows_of(kv: KVStorage, pages: NDArray[np.int64]) -> Tensor:
    """[..., K]: where each head's part of each of `pages` [...] lies in the storage."""
    heads = kv.shape.num_kv_heads
    return (torch.from_numpy(pages) * heads).unsqueeze(-1) + torch.arange(heads)
