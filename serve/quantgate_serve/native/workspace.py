"""Where decoder.c works: memory of a step's size, kept from step to step."""

from typing import Any

import torch

from quantgate_serve.native.quantized import CHUNK


class Workspace:
    """Memory that a step works in, kept from step to step."""

    def __init__(self, config: Any, head_dim: int, *, has_codes: bool) -> None:
        self.num_heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_dim = head_dim
        self.hidden = int(config.hidden_size)
        self._middle = int(config.intermediate_size)
        widest = max(self.num_heads * head_dim, self.hidden, self._middle)
        self._scratch = -(-widest // CHUNK) * CHUNK if has_codes else 0
        self._size = (0, 0)
        self._addresses: list[int] = []

    def of(self, tokens: int, threads: int) -> list[int]:
        """Addresses of what a step works in, in the order in which _Step has them."""
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
