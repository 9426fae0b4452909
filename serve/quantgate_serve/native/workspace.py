"""Where decoder.c works: memory of a step's size, kept from step to step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantgate_serve.native.quantized import CHUNK

# Results of more bytes than this are not kept: a long prompt's logits may be a gigabyte.
_MOST_KEPT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor, and where it lies."""

    tensor: Tensor
    address: int


class Workspace:
    """Memory that a step works in, kept from step to step."""

    def __init__(self, config: Any, head_dim: int, *, has_codes: bool, num_logits: int) -> None:
        self.num_heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_dim = head_dim
        self.hidden = int(config.hidden_size)
        self._middle = int(config.intermediate_size)
        widest = max(self.num_heads * head_dim, self.hidden, self._middle)
        self._scratch = -(-widest // CHUNK) * CHUNK if has_codes else 0
        self._size = (0, 0)
        self._addresses: list[int] = []
        self._num_logits = num_logits
        self._most_rows = _MOST_KEPT_BYTES // (4 * max(1, num_logits))
        self._num_rows = 0
        self._results = _make_results(0, self.hidden, num_logits)

    def of(self, tokens: int, threads: int) -> list[int]:
        """Addresses in the order of _Step; the same list as long as they are the same."""
        if tokens > self._size[0] or threads > self._size[1]:
            self._size = (max(tokens, self._size[0]), max(threads, self._size[1]))
            tokens, threads = self._size
            heads = (self.num_heads + 2 * self.kv_heads, self.num_heads)
            widths = (
                self.hidden,
                *(count * self.head_dim for count in heads),
                self._middle,
                threads * self.hidden,
                self._scratch,
            )
            self._tensors = [torch.empty(tokens * width) for width in widths]
            # A slot, a turn, a block of four numbers of 32 bits, and a byte.
            self._tensors += [torch.empty(tokens * n, dtype=torch.int64) for n in (1, 1, 2, 1)]
            self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        return self._addresses

    def results(self, rows: int) -> tuple[Matrix, Matrix]:
        """[rows or more, C] hidden states, and as many logits; the next step writes over them."""
        if rows <= self._num_rows:
            return self._results
        results = _make_results(rows, self.hidden, self._num_logits)
        if rows <= self._most_rows:
            self._num_rows, self._results = rows, results
        return results


def _make_results(rows: int, *widths: int) -> tuple[Matrix, Matrix]:
    hidden, logits = (torch.empty(rows, width) for width in widths)
    return Matrix(hidden, hidden.data_ptr()), Matrix(logits, logits.data_ptr())
