"""A request's embedding: the direction of the mean of its tokens' last hidden states."""

import numpy as np
from numpy.typing import NDArray

from quantgate_serve.request import Request


def add_hidden(request: Request, start: int, hidden_sum: NDArray[np.float32]) -> None:
    """Count a chunk in; one that starts at 0 begins anew, as after a preemption."""
    before = None if start == 0 else request.hidden_sum
    request.hidden_sum = hidden_sum if before is None else before + hidden_sum


def embedding_of(request: Request) -> tuple[float, ...] | None:
    """A vector of length 1, or of zeros where the states add up to them; None if none came."""
    if request.hidden_sum is None:
        return None
    length = float(np.linalg.norm(request.hidden_sum))
    scaled = request.hidden_sum / length if length > 0 else request.hidden_sum
    return tuple(scaled.astype(np.float32).tolist())
