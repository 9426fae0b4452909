"""NF4 weights of bitsandbytes, with or without double quantization.

Two codes to a byte, the first one high, row-major over [out, in]; blocks of `blocksize` codes share
an absmax. With double quantization the absmax is stored in 8 bits: codes into `nested_quant_map`,
scaled by one FP32 `nested_absmax` per 256, plus one offset. `quant_state` is JSON in a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantgate.audit.checkpoint import Checkpoint
from quantgate.audit.gptq import nibble_pairs
from quantgate.audit.rounding import NF4_CODES, dynamic_map, nf4_rounding_errors
from quantgate.audit.stored import CannotDequantize, Grouping

STATE = "weight.quant_state.bitsandbytes__nf4"
_PARTS = ("weight", "weight.absmax", "weight.quant_map", STATE)
_NESTED_PARTS = ("weight.nested_absmax", "weight.nested_quant_map")
PARTS = (*_PARTS, *_NESTED_PARTS)


@dataclass(slots=True, kw_only=True)
class Nf4Weight:
    """One module: bytes read as they are needed, scales held whole."""

    checkpoint: Checkpoint
    module: str
    shape: tuple[int, int]
    absmax: Tensor  # FP32 [blocks]
    grouping: Grouping
    is_double_quantized: bool
    num_bits: int
    problems: Sequence[str]

    def dequantize(self, start: int, stop: int) -> Tensor:
        num_in, length = self.shape[1], self.grouping.length
        first, last = start * num_in, stop * num_in
        data = self.checkpoint.read_flat(f"{self.module}.weight", first // 2, -(-last // 2))
        codes = torch.tensor(NF4_CODES)
        values = nibble_pairs(data, low_first=False, table=codes)[first % 2 :][: last - first]
        blocks = self.absmax[first // length : -(-last // length)]
        if first % length == 0 and last % length == 0:
            return values.view(-1, length).mul_(blocks.unsqueeze(1)).view(stop - start, num_in)
        each = blocks.repeat_interleave(length)[first % length :][: last - first]
        return values.mul_(each).view(stop - start, num_in)

    def rounding_errors(self, groups: Tensor) -> Tensor:
        return nf4_rounding_errors(groups, is_double_quantized=self.is_double_quantized)

    def steps(self, start: int, stop: int) -> Tensor | None:
        # The codes are not equally spaced.
        return None


def read_weight(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> Nf4Weight:
    """Reads one module.

    Args:
        shape: [out, in] of the source's weight.

    Raises:
        CannotDequantize: a tensor is missing, or sizes do not fit the source's shape.
    """
    state = read_state(checkpoint, module)
    is_nested = "nested_blocksize" in state
    parts = (*_PARTS, *_NESTED_PARTS) if is_nested else _PARTS
    missing = [part for part in parts if f"{module}.{part}" not in checkpoint]
    if missing:
        raise CannotDequantize(f"lacks {', '.join(missing)}")
    problems = []
    if list(state.get("shape", ())) != list(shape):
        problems.append(f"quant_state says shape {state.get('shape')}; expected {list(shape)}")
    blocksize: int = state["blocksize"]
    num_weights = shape[0] * shape[1]
    num_blocks = -(-num_weights // blocksize)
    stored = checkpoint[f"{module}.weight"]
    if stored.num_bytes != -(-num_weights // 2):
        raise CannotDequantize(f"{stored.num_bytes} bytes of codes for {num_weights} weights")
    absmax = checkpoint.read(f"{module}.weight.absmax").flatten()
    if len(absmax) != num_blocks:
        raise CannotDequantize(
            f"{len(absmax)} scales; blocks of {blocksize} over {num_weights} weights are "
            f"{num_blocks}"
        )
    # Kernels have the codes built in, and read the map only to tell NF4 from FP4.
    if not torch.equal(checkpoint.read(f"{module}.weight.quant_map"), torch.tensor(NF4_CODES)):
        problems.append("quant_map is not NF4's")
    if is_nested:
        table = checkpoint.read(f"{module}.weight.nested_quant_map")
        if not torch.allclose(table, dynamic_map(), rtol=0, atol=1e-6):
            problems.append("nested_quant_map is not the signed 8-bit dynamic type")
        nested = checkpoint.read(f"{module}.weight.nested_absmax")
        each = nested.repeat_interleave(int(state["nested_blocksize"]))[:num_blocks]
        if len(each) != num_blocks:
            raise CannotDequantize(f"{len(nested)} nested scales for {num_blocks} scales")
        absmax = table.take(absmax.long()).mul_(each).add_(float(state["nested_offset"]))
    return Nf4Weight(
        checkpoint=checkpoint,
        module=module,
        shape=shape,
        absmax=absmax.float(),
        grouping=Grouping(length=blocksize),
        is_double_quantized=is_nested,
        num_bits=8 * sum(checkpoint[f"{module}.{part}"].num_bytes for part in parts),
        problems=problems,
    )


def read_state(checkpoint: Checkpoint, module: str) -> dict[str, Any]:
    """The JSON beside the codes: block sizes, shape and offset.

    Raises:
        CannotDequantize: there is none, or it is not JSON with a blocksize.
    """
    if f"{module}.{STATE}" not in checkpoint:
        raise CannotDequantize(f"lacks {STATE}")
    try:
        state: dict[str, Any] = json.loads(
            checkpoint.read(f"{module}.{STATE}").numpy().tobytes().decode("utf-8")
        )
        state["blocksize"] = int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise CannotDequantize(f"quant_state cannot be read ({error})") from error
    return state
