"""Logits that are no numbers: found before a token is made of them."""

import torch
from torch import Tensor


class NonFiniteLogitsError(Exception):
    """The model gave NaN or infinity where a token or a log-probability is read."""


def check_finite(logits: Tensor) -> None:
    """Look at every row of `logits` [N, V]; some, but not all, of a row may be minus infinity.

    One pass: a row's maximum is NaN if any of it is.

    Raises:
        NonFiniteLogitsError: a row has no finite maximum.
    """
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        raise NonFiniteLogitsError("the model gave NaN or infinite logits")
