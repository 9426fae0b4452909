"""bf16: every floating-point tensor rounded to BF16, without loading the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantgate.files import write_json
from quantgate.variants.scheme import BuildNotes, BuildRequest, copy_sidecars
from quantgate.variants.source import INDEX_NAME, SourceModel


def build(source: SourceModel, out: Path, request: BuildRequest) -> BuildNotes:
    """Casts one shard at a time, so memory is bounded by the largest shard."""
    num_cast = 0
    for path in source.weight_files:
        tensors = {}
        with safe_open(path, framework="pt") as shard:
            metadata = shard.metadata()
            for name in shard.keys():  # noqa: SIM118 (safe_open is not iterable)
                tensor = shard.get_tensor(name)
                num_cast += tensor.is_floating_point() and tensor.dtype != torch.bfloat16
                tensors[name] = to_bf16(tensor)
        save_file(tensors, out / path.name, metadata=metadata or {"format": "pt"})
    index = source.folder / INDEX_NAME
    if index.is_file():
        shutil.copyfile(index, out / index.name)
    config = {k: v for k, v in source.config.items() if k != "torch_dtype"}
    write_json(out / "config.json", config | {"dtype": "bfloat16"})
    copy_sidecars(source, out)
    return BuildNotes(notes={"num_tensors_cast": num_cast})


def to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    """Rounds a floating-point tensor to BF16 (nearest, ties to even); others are returned as is."""
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
