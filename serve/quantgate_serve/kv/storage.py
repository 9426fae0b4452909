"""The tensors behind the KV pages: two per layer, allocated once.

A page is one contiguous block [KV heads, page_size, head dim], so that gathering a sequence's pages
head by head gives [KV heads, L, D] without a transposing copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantgate_serve import huge_pages


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token costs in the cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVStorage:
    """Keys and values of every layer: `keys[layer]` is [num_pages + 1, KV heads, page_size, D].

    The last page, `null_page`, belongs to nobody and stays zero: it pads short sequences.
    """

    def __init__(
        self, shape: KVShape, *, num_pages: int, page_size: int, device: torch.device
    ) -> None:
        self.shape = shape
        self.device = device
        self.page_size = page_size
        self.num_pages = num_pages
        self.null_page = num_pages
        size = (num_pages + 1, shape.num_kv_heads, page_size, shape.head_dim)
        # Zeros, not empty: unwritten slots of a page are read (and masked), and NaN * 0 is NaN.
        self.keys = [_zeros(size, shape.dtype, device) for _ in range(shape.num_layers)]
        self.values = [_zeros(size, shape.dtype, device) for _ in range(shape.num_layers)]
        row = page_size * shape.head_dim
        self._keys_by_page = [t.view(-1, row) for t in self.keys]
        self._values_by_page = [t.view(-1, row) for t in self.values]
        self._keys_by_slot = [t.view(-1, shape.head_dim) for t in self.keys]
        self._values_by_slot = [t.view(-1, shape.head_dim) for t in self.values]

    @property
    def num_slots(self) -> int:
        """(page, head, offset) triples of one layer, the null page's included."""
        return (self.num_pages + 1) * self.shape.num_kv_heads * self.page_size

    @property
    def num_bytes(self) -> int:
        return (self.num_pages + 1) * self.page_size * self.shape.bytes_per_token

    def write(self, layer: int, slot_rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Store `key` and `value` [T * KV heads, D] at `slot_rows` [T * KV heads]."""
        self._keys_by_slot[layer].index_copy_(0, slot_rows, key)
        self._values_by_slot[layer].index_copy_(0, slot_rows, value)

    def erase(self, pages: Sequence[int]) -> None:
        """Zero `pages`: what is not finite would reach whoever gets them next."""
        rows = torch.tensor(pages, device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            tensor.index_fill_(0, rows, 0)

    def by_slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values where they lie, [num_slots, D]."""
        return self._keys_by_slot[layer], self._values_by_slot[layer]

    def gather(self, layer: int, page_rows: Tensor, *, num_sequences: int) -> tuple[Tensor, Tensor]:
        """Contiguous keys and values [num_sequences * KV heads, L, D] of the pages in `page_rows`.

        `page_rows` [num_sequences * KV heads * P] counts (page, head) pairs.
        """
        batch = num_sequences * self.shape.num_kv_heads
        keys = self._keys_by_page[layer].index_select(0, page_rows)
        values = self._values_by_page[layer].index_select(0, page_rows)
        return (
            keys.view(batch, -1, self.shape.head_dim),
            values.view(batch, -1, self.shape.head_dim),
        )


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return huge_pages.zeros(size, dtype)
    return torch.zeros(size, dtype=dtype, device=device)
