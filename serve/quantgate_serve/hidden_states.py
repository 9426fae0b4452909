"""Takes the last hidden states of tokens that are to be embedded, on their way to the head.

Whatever way a step takes through the model (decoder.py, a recorded graph), what is read of it
passes the head. Rows that are embedded are read behind the others and set apart in front of the
head, so that no logits are computed of them.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class HiddenStates:
    """Watches one head. A step says how many rows it wants, and takes them."""

    def __init__(self, head: nn.Module | None) -> None:
        """`head` turns hidden states into logits; a model without one cannot embed."""
        self._head = head
        self._hook: RemovableHandle | None = None
        self._num_rows = 0
        self._taken: Tensor | None = None

    def expect(self, num_rows: int) -> None:
        """The last `num_rows` rows of the next step are not for the head.

        Watched only while something is wanted of it: what computes the head together with the rest
        of the model (native/decoder.py) cannot be.
        """
        self._forget()
        self._num_rows = num_rows
        if num_rows > 0 and self._head is not None:
            self._hook = self._head.register_forward_pre_hook(self._set_apart, prepend=True)

    def take(self) -> Tensor:
        """[num_rows, C] in FP32: what was set apart.

        Raises:
            RuntimeError: nothing came to the head.
        """
        taken = self._taken
        self._forget()
        if taken is None:
            raise RuntimeError("this model has no head whose input could be an embedding")
        return taken.float()

    def _forget(self) -> None:
        self._taken = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _set_apart(self, _head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        count = self._num_rows
        hidden: Tensor = inputs[0]  # [..., R, C]
        self._taken = hidden[..., -count:, :].reshape(count, hidden.shape[-1])
        return hidden[..., :-count, :], *inputs[1:]
