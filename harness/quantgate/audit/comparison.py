"""One weight of an artifact against the source's: relative errors, beside those of rounding alone.

Streams: a few rows of the source and of the artifact are in memory at a time, and per group three
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantgate.audit.checkpoint import Checkpoint
from quantgate.audit.report import WeightAudit
from quantgate.audit.rounding import squared_norms
from quantgate.audit.stored import StoredWeight

_CHUNK_ELEMENTS = 1 << 18
"""Of FP32: a few chunks stay in a core's cache; larger ones are slower (measured on 1.1 GB)."""

EXACT = 2.0**-12
"""Relative errors below this count as this: FP16 rounding, which is never a fault. It keeps ratios
finite where the healthy quantizer is exact, as a BF16 cast of BF16 weights is."""

_NEGLIGIBLE = 1e-3
"""Groups this small beside the typical group of their weight are not looked at on their own."""


@dataclass(slots=True)
class _Sums:
    """Per group, chunk by chunk."""

    error: list[Tensor] = field(default_factory=list)
    rounding: list[Tensor] = field(default_factory=list)
    norm: list[Tensor] = field(default_factory=list)
    stored_norm: list[Tensor] = field(default_factory=list)
    is_constant: list[Tensor] = field(default_factory=list)
    num_nearest: int = 0


@torch.inference_mode()
def compare_weight(
    name: str,
    source: Checkpoint,
    stored: StoredWeight,
    *,
    shape: tuple[int, ...],
    is_quantized: bool,
    counts_nearest: bool,
) -> WeightAudit:
    """Compares one stored weight with the source tensor of the same name.

    Args:
        shape: of the source's tensor.
        counts_nearest: also measure `nearest_share`, which takes two more passes.
    """
    num_rows, num_columns = stored.shape
    sums = _Sums()
    rows = _rows_per_chunk(num_columns, stored.grouping.length)
    has_steps = counts_nearest
    for start in range(0, num_rows, rows):
        stop = min(start + rows, num_rows)
        flat = source.read_flat(name, start * num_columns, stop * num_columns).float()
        weight = flat.view(stop - start, num_columns)
        if stored.grouping.order is not None:
            weight = weight[:, stored.grouping.order]
        groups = _in_groups(weight, stored.grouping.length)
        found = _in_groups(stored.dequantize(start, stop), stored.grouping.length)
        sums.rounding.append(stored.rounding_errors(groups))
        sums.norm.append(squared_norms(groups))
        sums.stored_norm.append(squared_norms(found))
        if is_quantized:
            # Two passes: torch.aminmax along a row takes fifteen times as long as both.
            sums.is_constant.append(found.amin(dim=1) == found.amax(dim=1))
        error = found.sub_(groups)
        sums.error.append(squared_norms(error))
        steps = stored.steps(start, stop) if has_steps else None
        has_steps = steps is not None
        if steps is not None:
            # A little more than half a step: the largest weight of a group lies that far beyond the
            # grid, and scales are stored in FP16.
            bound = steps.abs().mul(0.51).unsqueeze(1)
            sums.num_nearest += int((error.abs_() <= bound).sum())
    return _reduce(
        name, sums, shape=shape, stored=stored, is_quantized=is_quantized, has_steps=has_steps
    )


def _reduce(
    name: str,
    sums: _Sums,
    *,
    shape: tuple[int, ...],
    stored: StoredWeight,
    is_quantized: bool,
    has_steps: bool,
) -> WeightAudit:
    error, rounding = torch.cat(sums.error).double(), torch.cat(sums.rounding).double()
    norm, stored_norm = torch.cat(sums.norm).double(), torch.cat(sums.stored_norm).double()
    num_non_finite = int((~torch.isfinite(error)).sum())
    num_weights = stored.shape[0] * stored.shape[1]
    counted: dict[str, float | int | None] = dict.fromkeys(
        (
            "relative_error", "rounding_error", "error_ratio", "group_ratio", "worst_group",
            "group_gain", "worst_gain_group", "cosine",
        )
    )  # fmt: skip
    is_large = norm.sqrt() > _NEGLIGIBLE * norm.mean().sqrt()
    if not num_non_finite:
        whole = float(norm.sum().sqrt()) or 1.0
        relative = float(error.sum().sqrt()) / whole
        rounded = float(rounding.sum().sqrt()) / whole
        ratios = _group_ratios(error.sqrt(), rounding.sqrt(), norm.sqrt(), is_large)
        # <w, v> from |w - v|² = |w|² + |v|² - 2 <w, v>.
        inner = (norm + stored_norm - error) / 2
        gains = torch.where(is_large, 1 + (inner / norm.clamp(min=1e-300) - 1).abs(), 1.0)
        lengths = float((norm.sum() * stored_norm.sum()).sqrt())
        counted = {
            "relative_error": relative,
            "rounding_error": rounded,
            "error_ratio": max(relative, EXACT) / max(rounded, EXACT),
            "group_ratio": float(ratios.max()),
            "worst_group": int(ratios.argmax()),
            "group_gain": float(gains.max()),
            "worst_gain_group": int(gains.argmax()),
            # All weights zero have no direction; equal zeros are the same one.
            "cosine": float(inner.sum()) / lengths if lengths else float(error.sum() == 0),
        }
    constant = torch.cat(sums.is_constant) & is_large if is_quantized else is_large[:0]
    return WeightAudit(
        name=name,
        shape=shape,
        is_quantized=is_quantized,
        num_bits=stored.num_bits,
        num_groups=len(error),
        num_non_finite=num_non_finite,
        num_constant=int(constant.sum()),
        nearest_share=sums.num_nearest / num_weights if has_steps else None,
        problems=tuple(stored.problems),
        **counted,  # type: ignore[arg-type]
    )


def _group_ratios(error: Tensor, rounding: Tensor, norm: Tensor, is_large: Tensor) -> Tensor:
    """Each group's error over what rounding would make of it, 0 for negligible groups.

    A group that happens to lie on its grid rounds without error, so a group's own rounding error
    counts as at least half of the weight's typical one.
    """
    typical = torch.where(norm > 0, rounding / norm.clamp(min=1e-300), 0.0).median()
    floor = max(float(typical) / 2, EXACT) * norm
    healthy = torch.maximum(rounding, floor).clamp(min=1e-300)
    ratios = torch.maximum(error, EXACT * norm) / healthy
    return torch.where(is_large, ratios, 0.0)


def _rows_per_chunk(num_columns: int, group_length: int) -> int:
    """Rows to read at a time, whole groups in each chunk."""
    rows = max(1, _CHUNK_ELEMENTS // num_columns)
    step = 1
    while step * num_columns % group_length:
        step += 1
    return max(step, rows // step * step)


def _in_groups(matrix: Tensor, length: int) -> Tensor:
    """[G, length] of consecutive values; the last group of a weight is filled up with zeros."""
    flat = matrix.reshape(-1)
    if remainder := len(flat) % length:
        flat = torch.nn.functional.pad(flat, (0, length - remainder))
    return flat.view(-1, length)
