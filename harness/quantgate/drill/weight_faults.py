"""Faults in codes, scales and zero points: what packing, converting and loading get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from quantgate.drill.artifact import MutableArtifact, NotApplicable, group_of_shuffled
from quantgate.drill.fault import GPTQ, INT8, NF4, QUANTIZED, ArtifactFault, damage
from quantgate.drill.packing import pack_gptq, pack_int8, pack_nf4

_SCALES = {"int8-bnb": "SCB", "int4-nf4": "weight.absmax"} | dict.fromkeys(GPTQ, "scales")
_CODES = {"int8-bnb": "weight", "int4-nf4": "weight"} | dict.fromkeys(GPTQ, "qweight")
_STATE = "weight.quant_state.bitsandbytes__nf4"

_WEIGHTS = "{id: weights, metric: audit/weight_error.ratio, test: limit, max: 1.4 x}"
_GROUPS = "{id: groups, metric: audit/group_error.ratio, test: limit, max: 3 x}"
_SCALES_GATE = "{id: scales, metric: audit/group_gain.ratio, test: limit, max: 1.25 x}"
_FORMAT = "{id: format, metric: audit/format_difference.count, test: limit, max: 0 count}"
_CONSTANT = "{id: constant-blocks, metric: audit/constant_block.count, test: limit, max: 0 count}"
_CALIBRATED = "{id: calibrated, metric: audit/rounded_module.count, test: limit, max: 0 count}"
_FINITE = "{id: finite, metric: audit/non_finite.count, test: limit, max: 0 count}"


def weight_faults() -> list[ArtifactFault]:
    return [
        damage("zero-point-all", "every zero point one higher", GPTQ, _shift_zeros(None), _WEIGHTS),
        damage(
            "zero-point-one", "one module's zero points one higher", GPTQ, _shift_zeros("q_proj"),
            _WEIGHTS,
        ),
        damage(
            "v1-as-v2", "version 1 zero points declared as version 2", GPTQ,
            lambda a: a.configure(checkpoint_format="gptq_v2", format="gptq_v2"), _FORMAT,
        ),
        damage("scales-rolled-group", "a module's scales moved on by a group", GPTQ,
               _change_scales(lambda t: t.roll(1, 0)), _WEIGHTS),
        damage("scales-rolled-row", "a module's scales moved on by one", QUANTIZED,
               _change_scales(lambda t: t.roll(1, -1)), _WEIGHTS),
        damage("scales-swapped", "two modules' scales swapped", QUANTIZED, _swap_scales, _WEIGHTS),
        damage("one-scale-x16", "one scale 16 times too large", (*GPTQ, *INT8),
               _change_scales(_times(16)), _SCALES_GATE),
        damage("one-scale-x2", "one scale twice too large", (*GPTQ, *INT8),
               _change_scales(_times(2)), _SCALES_GATE),
        damage("one-scale-x16", "one nested scale 16 times too large", NF4, _nested_times(16),
               _SCALES_GATE),
        damage("one-scale-largest", "one block's scale set to the largest of its 256", NF4,
               _change_scales(_set_first(255)), _SCALES_GATE),
        damage("scale-offset-dropped", "the mean of the nested scales taken as 0", NF4,
               _drop_offset, _WEIGHTS),
        damage("scale-infinite", "one scale overflowed to infinity", (*GPTQ, *INT8),
               _change_scales(_times(float("inf"))), _FINITE),
        damage("wrong-group-size", "groups declared half as long as they are packed", GPTQ,
               _halve_groups, _FORMAT),
        damage("g-idx-dropped", "activation order used in packing and forgotten", GPTQ,
               _drop_order(None), _WEIGHTS),
        damage("g-idx-dropped-one", "one module's activation order forgotten", GPTQ,
               _drop_order("up_proj"), _WEIGHTS),
        damage("nibbles-swapped", "the two codes of each byte in the other order",
               ("int4-gptq", "int4-nf4"), _swap_nibbles, _WEIGHTS),
        damage("constant-codes", "a module packed to one constant", QUANTIZED, _constant_codes,
               _CONSTANT),
        damage("floor", "codes rounded down instead of to the nearest", QUANTIZED, _floor,
               _WEIGHTS),
        replace(
            damage("silent-rounding", "calibration fell back to rounding, in silence", GPTQ, _round,
                   _CALIBRATED),
            why_invisible="at 8 bits rounding and GPTQ may be equally good",
        ),
    ]  # fmt: skip


def _bits(artifact: MutableArtifact) -> int:
    return 8 if artifact.scheme == "int8-gptq" else 4


def _shift_zeros(end: str | None) -> Callable[[MutableArtifact], None]:
    def plant(artifact: MutableArtifact) -> None:
        one = 0x01010101 if _bits(artifact) == 8 else 0x11111111
        for module in artifact.modules() if end is None else [artifact.module(end)]:
            artifact.write_parts(module, {"qzeros": artifact.parts(module)["qzeros"] + one})

    return plant


def _change_scales(change: Callable[[Tensor], Tensor]) -> Callable[[MutableArtifact], None]:
    def plant(artifact: MutableArtifact) -> None:
        module, part = artifact.module(), _SCALES[artifact.scheme]
        artifact.write_parts(module, {part: change(artifact.parts(module)[part])})

    return plant


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    def change(scales: Tensor) -> Tensor:
        # Not the first: an index that is 0 everywhere hides mistakes of addressing.
        scales.view(-1)[len(scales.view(-1)) // 3] *= factor
        return scales

    return change


def _set_first(code: int) -> Callable[[Tensor], Tensor]:
    def change(codes: Tensor) -> Tensor:
        smallest = int(codes.argmin())
        codes.view(-1)[smallest] = code
        return codes

    return change


def _nested_times(factor: float) -> Callable[[MutableArtifact], None]:
    def plant(artifact: MutableArtifact) -> None:
        module = artifact.module()
        parts = artifact.parts(module)
        if "weight.nested_absmax" not in parts:
            raise NotApplicable("its scales are not nested")
        parts["weight.nested_absmax"][0] *= factor
        artifact.write_parts(module, {"weight.nested_absmax": parts["weight.nested_absmax"]})

    return plant


def _drop_offset(artifact: MutableArtifact) -> None:
    for module in artifact.modules():
        state = json.loads(artifact.parts(module)[_STATE].numpy().tobytes())
        if "nested_offset" not in state:
            raise NotApplicable("its scales are not nested")
        data = json.dumps(state | {"nested_offset": 0.0}).encode("utf-8")
        artifact.write_parts(module, {_STATE: torch.tensor(list(data), dtype=torch.uint8)})


def _swap_scales(artifact: MutableArtifact) -> None:
    first, second = artifact.module("gate_proj"), artifact.module("up_proj")
    mine, theirs = artifact.parts(first), artifact.parts(second)
    parts = [p for p in mine if p == _SCALES[artifact.scheme] or p == "weight.nested_absmax"]
    if first == second or any(mine[part].shape != theirs[part].shape for part in parts):
        raise NotApplicable("no two modules have scales of one shape")
    artifact.write_parts(first, {part: theirs[part] for part in parts})
    artifact.write_parts(second, {part: mine[part] for part in parts})


def _halve_groups(artifact: MutableArtifact) -> None:
    scales = artifact.parts(artifact.module())["scales"]
    num_in = artifact.source_weight(artifact.module()).shape[1]
    artifact.configure(group_size=num_in // len(scales) // 2)


def _drop_order(end: str | None) -> Callable[[MutableArtifact], None]:
    def plant(artifact: MutableArtifact) -> None:
        for module in artifact.modules() if end is None else [artifact.module(end)]:
            weight = artifact.source_weight(module)
            size = weight.shape[1] // len(artifact.parts(module)["scales"])
            shuffled = group_of_shuffled(weight.shape[1], size)
            packed = pack_gptq(weight, bits=_bits(artifact), group_size=size, group_of=shuffled)
            packed["g_idx"] = (torch.arange(weight.shape[1]) // size).int()
            artifact.write_parts(module, packed)
        artifact.configure(desc_act=True)

    return plant


def _swap_nibbles(artifact: MutableArtifact) -> None:
    part = _CODES[artifact.scheme]
    for module in artifact.modules():
        codes = artifact.parts(module)[part]
        data = codes.view(torch.uint8)
        artifact.write_parts(module, {part: (data >> 4 | data << 4).view(codes.dtype)})


def _constant_codes(artifact: MutableArtifact) -> None:
    module, part = artifact.module("o_proj"), _CODES[artifact.scheme]
    codes = artifact.parts(module)[part]
    value = {"qweight": -0x77777778, "weight": 0x88}[part]
    constant = torch.full_like(codes, value if codes.dtype != torch.int8 else 1)
    artifact.write_parts(module, {part: constant})


def _floor(artifact: MutableArtifact) -> None:
    _repack(artifact, torch.floor)


def _round(artifact: MutableArtifact) -> None:
    _repack(artifact, torch.round)


def _repack(artifact: MutableArtifact, rounding: Callable[[Tensor], Tensor]) -> None:
    changes: dict[str, Tensor | None] = {}
    for module in artifact.modules():
        weight = artifact.source_weight(module)
        if artifact.scheme == "int8-bnb":
            parts = pack_int8(weight, rounding=rounding)
        elif artifact.scheme == "int4-nf4":
            is_nested = "weight.nested_absmax" in artifact.parts(module)
            parts = pack_nf4(
                weight,
                is_double_quantized=is_nested,
                rounding_up=False if rounding is torch.floor else None,
            )
        else:
            size = weight.shape[1] // len(artifact.parts(module)["scales"])
            parts = pack_gptq(weight, bits=_bits(artifact), group_size=size, rounding=rounding)
        changes |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    artifact.write(changes)
