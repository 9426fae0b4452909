"""The seam to transformers: our attention under a name, and the per-step facts it needs.

The facts travel as the keyword argument `quantgate_step` of `model(...)` down to the attention,
so that nothing is global. An unregistered mask name makes transformers pass mask=None.

Shapes: T tokens of the step, B sequences, N query heads, K key/value heads, D head dim, L length.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import AttentionInterface

from quantgate_serve.attention.in_place import SlotLookup
from quantgate_serve.kv.storage import KVStorage

ATTENTION_NAME = "quantgate_paged"


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of similar length that attend with one new token each.

    `page_rows` [B * K * P] says what to gather; `bias` [B * K, 1, L] is 0 or -inf. `lookup` says
    the same slot by slot, where attention can read keys and values in place.
    """

    start: int
    count: int
    page_rows: Tensor
    bias: Tensor
    lookup: SlotLookup | None = None


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One sequence's chunk of prompt. With an empty cache behind it, rows and mask are None."""

    start: int
    length: int
    page_rows: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Everything attention needs to know about one step. `slot_rows` is [T * K]."""

    kv: KVStorage
    slot_rows: Tensor
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillSpan, ...]


def register(forward: Callable[..., tuple[Tensor, None]]) -> None:
    """Make `forward` known to transformers as `quantgate_paged`."""
    AttentionInterface.register(ATTENTION_NAME, forward)
