"""GPTQ checkpoints (the AutoGPTQ format) in plain torch, exact in FP32.

GPTQModel's CPU kernel computes in BF16 and rounds the scales to it, so a difference of 1e-7 in its
input becomes 4e-3 in its output; here the codes stay packed and each forward expands its own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

_TENSORS = ("qweight", "qzeros", "scales", "g_idx")


class GptqFormatError(Exception):
    """The checkpoint is not one that this file can read."""


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """What config.json says about the packing. `zero_offset` is 1 in format v1, 0 in v2."""

    bits: int
    group_size: int
    zero_offset: int


class GptqLinear(nn.Module):
    """y = x W^T + b with W [in, out] as 4- or 8-bit codes, (code - zero) * scale.

    4-bit codes lie two in a byte, the first half of a group's rows low, the second high, so that
    each half expands into one contiguous block.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    order: Tensor
    bias: Tensor | None

    def __init__(
        self, tensors: dict[str, Tensor], bias: Tensor | None, settings: GptqSettings
    ) -> None:
        super().__init__()
        codes = unpack_rows(tensors["qweight"], settings.bits)  # [in, out]
        zeros = unpack_columns(tensors["qzeros"], settings.bits) + settings.zero_offset
        groups = tensors["g_idx"].long()
        self.in_features, self.out_features = codes.shape
        self.is_packed = settings.bits == 4
        order = torch.argsort(groups, stable=True)
        # desc_act spreads a group over the input; sorted columns make every group contiguous.
        self.is_sorted = bool((order == torch.arange(len(order))).all())
        sizes = torch.bincount(groups, minlength=len(zeros))
        if not bool((sizes == sizes[0]).all()):
            raise GptqFormatError("groups of unequal size")
        grouped = codes[order].view(len(zeros), -1, self.out_features)  # [G, in / G, out]
        self.group_length = grouped.shape[1]
        if self.is_packed:
            half = self.group_length // 2
            grouped = grouped[:, :half] | (grouped[:, half:] << 4)
        self.register_buffer("codes", grouped.to(torch.uint8).contiguous())
        self.register_buffer("zeros", zeros.unsqueeze(1).float())  # [G, 1, out]
        self.register_buffer("scales", tensors["scales"].unsqueeze(1).float())
        self.register_buffer("order", order)
        self.register_buffer("bias", bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [in, out], rows in sorted order."""
        codes, zeros = self.codes, self.zeros
        shape = (len(codes), self.group_length, self.out_features)
        weight = torch.empty(shape, dtype=torch.float32, device=codes.device)
        if self.is_packed:
            half = self.group_length // 2
            torch.sub(codes & 15, zeros, out=weight[:, :half])
            torch.sub(codes >> 4, zeros, out=weight[:, half:])
        else:
            torch.sub(codes, zeros, out=weight)
        return weight.mul_(self.scales).view(self.in_features, self.out_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_sorted:
            x = x[..., self.order]
        return functional.linear(x, self.dequantize(x.dtype).t(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def load_gptq(
    folder: Path, config: Any, settings: dict[str, Any], *, dtype: torch.dtype, attention: str
) -> Any:
    """A model of `folder` whose quantized Linears are GptqLinear.

    Raises:
        GptqFormatError: the packing is not known here, or tensors are missing or left over.
    """
    chosen = read_settings(settings)
    plain = type(config).from_dict(
        {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    )
    model = transformers.AutoModelForCausalLM.from_config(
        plain, dtype=dtype, attn_implementation=attention
    )
    tensors = _read_tensors(folder)
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    for name in names:
        parent, _, child = name.rpartition(".")
        found = {key: tensors.pop(f"{name}.{key}", None) for key in _TENSORS}
        missing = [key for key, tensor in found.items() if tensor is None]
        if missing:
            raise GptqFormatError(f"{folder}: {name} lacks {', '.join(missing)}")
        bias = tensors.pop(f"{name}.bias", None)
        linear = GptqLinear(
            {key: tensor for key, tensor in found.items() if tensor is not None},
            None if bias is None else bias.to(dtype),
            chosen,
        )
        setattr(model.get_submodule(parent), child, linear)
    result = model.load_state_dict(tensors, strict=False)
    ours = tuple(f"{name}." for name in names)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    missing = [k for k in result.missing_keys if not k.startswith(ours) and k not in tied]
    if missing or result.unexpected_keys:
        raise GptqFormatError(
            f"{folder}: missing tensors {missing[:3]}, unknown tensors {result.unexpected_keys[:3]}"
        )
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def read_settings(values: dict[str, Any]) -> GptqSettings:
    """The packing that `quantization_config` describes."""
    bits = values.get("bits")
    if bits not in (4, 8):
        raise GptqFormatError(f"bits is {bits!r}; 4 and 8 are known here")
    form = str(values.get("checkpoint_format") or values.get("format") or "gptq")
    offsets = {"gptq": 1, "gptq_v2": 0}
    if form not in offsets:
        raise GptqFormatError(f"format is {form!r}; gptq and gptq_v2 are known here")
    return GptqSettings(bits, int(values.get("group_size", -1)), offsets[form])


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Codes [in, out] of `qweight` [in * bits / 32, out], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32).view(1, -1, 1)
    codes = (packed.unsqueeze(1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(-1, packed.shape[1])


def unpack_columns(packed: Tensor, bits: int) -> Tensor:
    """Codes [G, out] of `qzeros` [G, out * bits / 32], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(len(packed), -1)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                tensors[key] = file.get_tensor(key)
    return tensors
