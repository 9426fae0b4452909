"""AutoGPTQ checkpoints, versions 1 and 2, 4 and 8 bit, with or without activation order.

Written from the format's definition, sharing no code with the loader that the server uses:
`qweight` int32 [in * bits / 32, out] holds codes of consecutive inputs, lowest bits first; `qzeros`
int32 [groups, out * bits / 32] zero points of consecutive outputs (minus 1 in version 1); `scales`
[groups, out]; `g_idx` [in] the group of each input. W[o, i] = (code - zero[g, o]) * scale[g, o].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantgate.audit.checkpoint import Checkpoint
from quantgate.audit.rounding import uniform_rounding_errors
from quantgate.audit.stored import CannotDequantize, Grouping

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_VERSIONS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqFormat:
    """What quantization_config declares."""

    bits: int
    group_size: int
    """-1 for one group over all inputs."""
    is_symmetric: bool
    has_activation_order: bool
    zero_offset: int
    """What is added to a stored zero point: 1 in version 1, 0 in version 2."""


def read_format(values: Mapping[str, Any]) -> GptqFormat:
    """Reads `quantization_config`.

    Raises:
        CannotDequantize: bits or version are unknown here.
    """
    bits = values.get("bits")
    if bits not in (4, 8):
        raise CannotDequantize(f"bits is {bits!r}; expected 4 or 8")
    version = str(values.get("checkpoint_format") or values.get("format") or "gptq")
    if version not in _VERSIONS:
        raise CannotDequantize(f"format is {version!r}; expected gptq or gptq_v2")
    return GptqFormat(
        bits=int(bits),
        group_size=int(values.get("group_size", -1)),
        is_symmetric=bool(values.get("sym", True)),
        has_activation_order=bool(values.get("desc_act", False)),
        zero_offset=_VERSIONS[version],
    )


@dataclass(slots=True, kw_only=True)
class GptqWeight:
    """One module's packed tensors, checked against the declared format."""

    form: GptqFormat
    shape: tuple[int, int]
    qweight: Tensor
    scales: Tensor  # FP32 [out, groups]
    zeros: Tensor  # FP32 [out, groups]
    group_of: Tensor  # [in]
    grouping: Grouping
    num_bits: int
    problems: Sequence[str]

    def dequantize(self, start: int, stop: int) -> Tensor:
        words = self.qweight[:, start:stop].t().contiguous()  # [n, in * bits / 32]
        codes = unpack(words, self.form.bits)  # [n, in]
        scales, zeros = self.scales[start:stop], self.zeros[start:stop]
        if self.grouping.length == self.shape[1] and scales.shape[1] != 1:
            # Groups that are no partition into equal parts: every input looks up its own.
            return codes.sub_(zeros[:, self.group_of]).mul_(scales[:, self.group_of])
        if self.grouping.order is not None:
            codes = codes[:, self.grouping.order]
        grouped = codes.view(stop - start, -1, self.grouping.length)
        return grouped.sub_(zeros.unsqueeze(2)).mul_(scales.unsqueeze(2)).view(stop - start, -1)

    def rounding_errors(self, groups: Tensor) -> Tensor:
        # Symmetric codes run from -8 to 7 (at 4 bits) around a zero of 8: 15 steps for 2 * absmax.
        return uniform_rounding_errors(groups, steps=2**self.form.bits - 1)

    def steps(self, start: int, stop: int) -> Tensor | None:
        if self.grouping.length == self.shape[1] and self.scales.shape[1] != 1:
            return None
        return self.scales[start:stop].reshape(-1)


def read_weight(
    checkpoint: Checkpoint, module: str, form: GptqFormat, shape: tuple[int, int]
) -> GptqWeight:
    """Reads one module.

    Args:
        shape: [out, in] of the source's weight.

    Raises:
        CannotDequantize: a tensor is missing, or a shape does not fit the source's.
    """
    missing = [part for part in PARTS if f"{module}.{part}" not in checkpoint]
    if missing:
        raise CannotDequantize(f"lacks {', '.join(missing)}")
    stored = {part: checkpoint.read(f"{module}.{part}") for part in PARTS}
    num_out, num_in = shape
    per_word = 32 // form.bits
    found = tuple(stored["qweight"].shape)
    if found != (num_in // per_word, num_out):
        raise CannotDequantize(
            f"qweight is {found}; expected {(num_in // per_word, num_out)} for {form.bits} bits"
        )
    num_groups = len(stored["scales"])
    if tuple(stored["scales"].shape) != (num_groups, num_out):
        raise CannotDequantize(f"scales are {tuple(stored['scales'].shape)}, out is {num_out}")
    if tuple(stored["qzeros"].shape) != (num_groups, num_out // per_word):
        raise CannotDequantize(
            f"qzeros are {tuple(stored['qzeros'].shape)}; expected "
            f"{(num_groups, num_out // per_word)}"
        )
    group_of = stored["g_idx"].long()
    if group_of.shape != (num_in,):
        raise CannotDequantize(f"g_idx is {tuple(group_of.shape)}; expected ({num_in},)")
    if int(group_of.min()) < 0 or int(group_of.max()) >= num_groups:
        raise CannotDequantize(
            f"g_idx runs from {int(group_of.min())} to {int(group_of.max())}, and there are "
            f"{num_groups} groups"
        )
    zeros = unpack(stored["qzeros"], form.bits) + form.zero_offset  # [groups, out]
    checks = _Checks(form=form, num_in=num_in, num_groups=num_groups)
    grouping = checks.grouping(group_of)
    checks.zero_points(zeros)
    return GptqWeight(
        form=form,
        shape=shape,
        qweight=stored["qweight"],
        scales=stored["scales"].float().t().contiguous(),
        zeros=zeros.t().contiguous(),
        group_of=group_of,
        grouping=grouping,
        num_bits=8 * sum(checkpoint[f"{module}.{part}"].num_bytes for part in PARTS),
        problems=checks.problems,
    )


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes as FP32 [rows, columns * 32 / bits] of int32 words, lowest bits first."""
    # A little-endian int32 is four bytes in the order of their codes.
    data = words.view(torch.uint8)
    if bits == 8:
        return data.float()
    return nibble_pairs(data, low_first=True)


def nibble_pairs(data: Tensor, *, low_first: bool, table: Tensor | None = None) -> Tensor:
    """Two FP32 values for each byte, side by side; `table` maps the 16 codes, None for 0 to 15."""
    values = torch.arange(16, dtype=torch.float32) if table is None else table
    byte = torch.arange(256)
    low, high = values[byte & 15], values[byte >> 4]
    # One lookup of 64 bits writes both values.
    pairs = torch.stack((low, high) if low_first else (high, low), dim=1)
    looked_up = pairs.view(torch.int64).flatten().index_select(0, data.reshape(-1).int())
    return looked_up.view(torch.float32).view(*data.shape[:-1], -1)


@dataclass(slots=True, kw_only=True)
class _Checks:
    form: GptqFormat
    num_in: int
    num_groups: int
    problems: list[str] = field(default_factory=list)

    def grouping(self, group_of: Tensor) -> Grouping:
        """The groups as stored; how they differ from the declared ones is a problem."""
        size = self.form.group_size if self.form.group_size > 0 else self.num_in
        expected = -(-self.num_in // size)
        if self.num_groups != expected:
            self.problems.append(
                f"{self.num_groups} groups; group_size {size} over {self.num_in} inputs is "
                f"{expected}"
            )
        in_order = torch.arange(self.num_in) // size
        is_plain = bool(torch.equal(group_of, in_order))
        if not is_plain and not self.form.has_activation_order:
            self.problems.append("g_idx is not in order, and desc_act is false")
        sizes = torch.bincount(group_of, minlength=self.num_groups)
        if int(sizes.min()) != int(sizes.max()):
            if self.num_in % size == 0:
                self.problems.append(
                    f"g_idx has groups of {int(sizes.min())} to {int(sizes.max())} inputs; "
                    f"expected {size} in each"
                )
            return Grouping(length=self.num_in)
        length = self.num_in // self.num_groups
        if bool((group_of[1:] >= group_of[:-1]).all()):
            return Grouping(length=length)
        return Grouping(length=length, order=torch.argsort(group_of, stable=True))

    def zero_points(self, zeros: Tensor) -> None:
        middle = 2 ** (self.form.bits - 1)
        if self.form.is_symmetric and bool((zeros != middle).any()):
            found = int(zeros[zeros != middle][0])
            version = "1" if self.form.zero_offset else "2"
            self.problems.append(
                f"a zero point is {found} in format version {version}; symmetric weights have "
                f"{middle}"
            )
