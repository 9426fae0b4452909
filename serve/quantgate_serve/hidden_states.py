"""Takes the last hidden states of tokens that are to be embedded, on their way to the head.

Whatever way a step takes through the model (decoder.py, a recorded graph), what is read of it
passes the head. Rows that are embedded are read behind the others and set apart in front of the
head, so that no logits are computed of them.
"""

from typing import Any

from torch import Tensor, nn


class HiddenStates:
    """Watches one head. A step says how many rows it wants, and takes them."""

    def __init__(self, head: nn.Module | None) -> None:
        """`head` turns hidden states into logits; a model without one cannot embed."""
        self._num_rows = 0
        self._taken: Tensor | None = None
        if head is not None:
            head.register_forward_pre_hook(self._set_apart)

    def expect(self, num_rows: int) -> None:
        """The last `num_rows` rows of the next step are not for the head."""
        self._num_rows = num_rows
        self._taken = None

    def take(self) -> Tensor:
        """[num_rows, C] in FP32: what was set apart.

        Raises:
            RuntimeError: nothing came to the head.
        """
        taken, self._taken, self._num_rows = self._taken, None, 0
        if taken is None:
            raise RuntimeError("this model has no head whose input could be an embedding")
        return taken.float()

    def _set_apart(self, _head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        count = self._num_rows
        if not count:
            return None
        hidden: Tensor = inputs[0]  # [..., R, C]
        self._taken = hidden[..., -count:, :].reshape(count, hidden.shape[-1])
        return hidden[..., :-count, :], *inputs[1:]
