"""The healthy twin of a variant: the reference with weights rounded as its scheme rounds them.

What rounding alone does to a model is the floor that a variant of the same scheme is compared with:
a fault in one module is lost in an absolute limit, and stands out against the twin. Weights are
rounded in memory, by code that shares nothing with the quantizers and their kernels.

Shapes: O outputs, I inputs of a Linear; B blocks of weights that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_GPTQ_BITS = {"int8-gptq": 8, "int4-gptq": 4}
_NF4_BLOCK = 64
_OUTLIER = 6.0
_LARGEST_INT8 = 127
_SMALLEST_SCALE = 1e-12


def make_healthy(model: Any, scheme: str, *, group_size: int) -> None:
    """Rounds a loaded transformers model in place, as far as its scheme does.

    A cast to BF16 rounds every parameter; the others every Linear but the output head.

    Args:
        scheme: one of the schemes; any other is a ValueError.
        group_size: inputs that share a scale, for GPTQ; all of a row where it does not divide it.
    """
    import torch

    head = model.get_output_embeddings()
    with torch.no_grad():
        if scheme == "bf16":
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
            return
        rounded = _rounding_of(scheme, group_size)
        for module in model.modules():
            if not isinstance(module, torch.nn.Linear) or module is head:
                continue
            module.weight.copy_(rounded(module.weight.float()).to(module.weight.dtype))
            if scheme == "int8-bnb":
                module.register_forward_pre_hook(_round_inputs)


def _rounding_of(scheme: str, group_size: int) -> Callable[[Tensor], Tensor]:
    """[O, I] FP32 to [O, I] FP32, as stored and read again."""
    if scheme == "int8-bnb":
        return _round_rows
    if scheme == "int4-nf4":
        return _round_nf4
    if scheme in _GPTQ_BITS:
        return lambda weight: _round_symmetric(weight, _GPTQ_BITS[scheme], group_size)
    raise ValueError(f"no healthy twin for scheme {scheme!r}")


def _round_rows(values: Tensor) -> Tensor:
    """Integers of -127 to 127 with the largest value of each row as 127."""
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(_SMALLEST_SCALE) / _LARGEST_INT8
    return (values / scale).round() * scale


def _round_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Activations as LLM.int8() sees them: by row, but for columns that hold an outlier.

    Source: Dettmers et al., LLM.int8() (2022), section 3.2.
    """
    import torch

    (values,) = inputs
    flat = values.reshape(-1, values.shape[-1]).float()
    is_outlier = (flat.abs() >= _OUTLIER).any(dim=0)
    rounded = _round_rows(flat.masked_fill(is_outlier, 0.0))
    seen = torch.where(is_outlier, flat, rounded)
    return (seen.reshape(values.shape).to(values.dtype),)


def _round_nf4(weight: Tensor) -> Tensor:
    """Blocks of 64 along the flattened weight, each value to the nearest code times its absmax."""
    import torch

    from quantgate.audit.rounding import NF4_CODES

    codes = torch.tensor(NF4_CODES, device=weight.device)
    flat = weight.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
    absmax = padded.abs().amax(dim=1, keepdim=True)  # [B, 1]
    index = torch.bucketize(
        padded / absmax.clamp_min(_SMALLEST_SCALE), (codes[1:] + codes[:-1]) / 2
    )
    return (codes[index] * absmax).flatten()[: len(flat)].view(weight.shape)


def _round_symmetric(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Consecutive groups of each row on a symmetric grid, with scales in FP16."""
    num_inputs = weight.shape[1]
    size = num_inputs if num_inputs % group_size else group_size
    groups = weight.view(-1, size)
    largest = 2 ** (bits - 1)
    scale = (groups.abs().amax(dim=1, keepdim=True) * 2 / (2**bits - 1)).half().float()
    codes = (groups / scale.clamp_min(_SMALLEST_SCALE)).round().clamp(-largest, largest - 1)
    rounded: Tensor = codes * scale
    return rounded.view(weight.shape)
