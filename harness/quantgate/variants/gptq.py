"""int4-gptq and int8-gptq: GPTQModel, written in the AutoGPTQ checkpoint format.

`format="gptq"`, symmetric, no activation order: readable by AutoGPTQ, Marlin, Machete, ExLlamaV2
and vLLM alike.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from quantgate.files import read_json, write_json
from quantgate.variants.scheme import (
    DEFAULT_GROUP_SIZE,
    BuildNotes,
    BuildRequest,
    copy_sidecars,
)
from quantgate.variants.source import SourceModel
from quantgate.variants.surprise import surprise_ratio
from quantgate_serve.imports import uncollected

_BITS = {"int4-gptq": 4, "int8-gptq": 8}
# Symmetric AutoGPTQ v1 files store zero - 1 in every nibble or byte.
_SYMMETRIC_V1_ZEROS = {4: 0x77777777, 8: 0x7F7F7F7F}


def build(source: SourceModel, out: Path, request: BuildRequest) -> BuildNotes:
    """Calibrates and packs.

    Raises:
        ValueError: no calibration documents, or a Linear's width is no multiple of the group size.
        RuntimeError: GPTQModel fell back to rounding, or wrote other zero points than the format's.
    """
    bits = _BITS[request.scheme]
    group_size = int(request.options.get("group_size") or DEFAULT_GROUP_SIZE)
    if not request.calibration_ids:
        raise ValueError(
            f"{request.scheme} needs calibration documents; name a file in the policy: "
            "calibration: {path: calibration.jsonl}."
        )
    _check_widths(source, group_size)
    # Read once, on import: without it GPTQModel sizes its pools from all cores of the host.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))
    with uncollected():
        import torch
        from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=bits,
        group_size=group_size,
        sym=True,
        desc_act=False,
        format="gptq",
        # Staging layers on disk makes a 3 M-parameter model take 42 s instead of 7 s on two cores.
        offload_to_disk=False,
    )
    # FP32 on CPU, since BF16 Hessians are slow and coarse there.
    dtype = torch.float32 if request.device == "cpu" else torch.bfloat16
    model = GPTQModel.load(
        str(source.folder), config, device=request.device, dtype=dtype, trust_remote_code=False
    )
    # Before it is quantized, since it is the source's reading that counts.
    surprise = surprise_ratio(model.model, request.calibration_ids)
    calibration = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in request.calibration_ids
    ]
    model.quantize(calibration, batch_size=int(request.options.get("batch_size", 4)))
    model.save(str(out))
    losses = _read_losses(out / "quant_log.csv")
    _store_the_rest_in_bf16(out, bits)
    _drop_paths(out)
    copy_sidecars(source, out)
    worst = max(losses, key=losses.__getitem__)
    return BuildNotes(
        notes={
            "num_quantized_modules": len(losses),
            "group_size": group_size,
            "worst_module": worst,
            "worst_module_loss": losses[worst],
            "calibration_surprise": surprise,
        }
    )


def _check_widths(source: SourceModel, group_size: int) -> None:
    # Widths come from the config, before GPTQModel spends minutes on Hessians.
    config = source.config
    widths = {key: config.get(key) for key in ("hidden_size", "intermediate_size")}
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    if isinstance(heads, int) and isinstance(head_dim, int):
        # What the attention's output projection reads; not always the hidden size.
        widths["num_attention_heads * head_dim"] = heads * head_dim
    for key, width in widths.items():
        if isinstance(width, int) and width % group_size:
            raise ValueError(
                f"{key} {width} is not a multiple of group_size {group_size}; "
                "choose a group size that divides it, such as 32 or 64."
            )


def _read_losses(path: Path) -> dict[str, float]:
    """The loss of each quantized module; a silent fallback to rounding is an error, not a variant.

    The file is removed: it holds wall-clock times, so it would give every build another digest.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    path.unlink()
    if not rows:
        raise RuntimeError("GPTQModel quantized nothing: its log lists no module.")
    names = [f"layers.{row['layer']}.{row['module']}" for row in rows]
    fallen = [n for n, row in zip(names, rows, strict=True) if "fallback" in row["loss"]]
    if fallen:
        raise RuntimeError(
            f"GPTQModel fell back to round-to-nearest for {', '.join(fallen[:5])}: too little "
            "calibration data reached them. Give more or longer calibration documents."
        )
    return {name: float(row["loss"]) for name, row in zip(names, rows, strict=True)}


def _store_the_rest_in_bf16(out: Path, bits: int) -> None:
    """Rounds what is not quantized to BF16, and checks the stored zero points."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from quantgate.variants.bf16 import to_bf16

    for path in sorted(out.glob("*.safetensors")):
        tensors = {}
        with safe_open(path, framework="pt") as shard:
            metadata = shard.metadata()
            for name in shard.keys():  # noqa: SIM118 (safe_open is not iterable)
                tensor = shard.get_tensor(name)
                if name.endswith(".qzeros") and (tensor != _SYMMETRIC_V1_ZEROS[bits]).any():
                    raise RuntimeError(
                        f"{name}: zero points are not AutoGPTQ v1 symmetric "
                        f"({_SYMMETRIC_V1_ZEROS[bits]:#x}); other loaders would shift every weight."
                    )
                tensors[name] = tensor if name.endswith(".scales") else to_bf16(tensor)
        save_file(tensors, path, metadata=metadata or {"format": "pt"})


def _drop_paths(out: Path) -> None:
    """Removes the temporary path GPTQModel writes into both configs: it would change the digest."""
    for name in ("config.json", "quantize_config.json"):
        path = out / name
        value: dict[str, Any] = read_json(path)
        quantization = value.get("quantization_config", value)
        quantization.get("meta", {}).pop("offload_to_disk_path", None)
        if name == "config.json":
            value["dtype"] = "bfloat16"
        write_json(path, value)
