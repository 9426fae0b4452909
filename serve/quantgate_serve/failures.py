"""Why a step failed: of memory or not, and what its client is told."""

import torch

from quantgate_serve.finite import NonFiniteLogitsError
from quantgate_serve.request import RequestError
from quantgate_serve.structured import GrammarError


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has an exception for it; the CPU allocator raises a RuntimeError that says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def request_error(error: Exception, *, is_oom: bool) -> RequestError:
    """What the client of a request that failed alone is told."""
    if isinstance(error, NonFiniteLogitsError):
        return RequestError(
            f"{error} for this request, so there is no token to choose. Other requests are not "
            "affected; the variant should be measured again.",
            "non_finite_logits",
        )
    if isinstance(error, GrammarError):
        return RequestError(f"response_format: {error}", "grammar_too_complex")
    if is_oom:
        return RequestError(
            "out of memory: this request does not fit even alone. Shorten it.", "out_of_memory"
        )
    return RequestError(f"the model failed on this request: {error}", "engine_error")
