"""Logits that are no numbers: found before a token is made of them."""

import numpy as np
import torch
from torch import Tensor


class NonFiniteLogitsError(Exception):
    """The model gave NaN or infinity where a token or a log-probability is read."""


def all_finite(logits: Tensor) -> Tensor:
    """Whether every row of `logits` [N, V] has a finite maximum, [] on their device.

    Some, but not all, of a row may be minus infinity. One pass: a maximum is NaN if any of it is.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # As in sampling.py: numpy needs half the time of torch here.
        return torch.from_numpy(np.isfinite(logits.numpy().max(axis=-1))).all()
    return torch.isfinite(logits.amax(dim=-1)).all()


def check_finite(is_finite: bool) -> None:
    """Raises NonFiniteLogitsError unless `is_finite`."""
    if not is_finite:
        raise NonFiniteLogitsError("the model gave NaN or infinite logits")
