"""A copy of an artifact to plant faults in; unchanged files are links to the sound ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantgate.audit.checkpoint import Checkpoint
from quantgate.files import read_json, write_json
from quantgate.variants.build import Variant
from quantgate.variants.manifest import MANIFEST_NAME, digest_files
from quantgate.variants.source import SourceModel

_MARKS = (".qweight", ".SCB", ".weight.quant_state.bitsandbytes__nf4")


class NotApplicable(Exception):
    """The artifact has nothing that this fault could be planted in."""


class MutableArtifact:
    """Tensors and files of one mutant, by name."""

    def __init__(self, sound: Variant, folder: Path, source: SourceModel) -> None:
        shutil.copytree(sound.folder, folder, copy_function=_link)
        self.folder = folder
        self.scheme = sound.manifest.scheme
        self.source = source
        self._sound = sound

    def variant(self) -> Variant:
        """The mutant under a manifest of its own, as a tool that builds damaged files writes it."""
        manifest = replace(self._sound.manifest, files=digest_files(self.folder))
        return Variant(name=self._sound.name, folder=self.folder, manifest=manifest)

    # --- tensors ---

    def modules(self) -> list[str]:
        """Quantized modules in the order of their names; plain matrices in a cast."""
        with Checkpoint(self.folder) as checkpoint:
            found = {
                name.removesuffix(mark)
                for name in checkpoint.tensors
                for mark in _MARKS
                if name.endswith(mark)
            }
            if not found:
                found = {
                    name.removesuffix(".weight")
                    for name, tensor in checkpoint.tensors.items()
                    if ".layers." in name and len(tensor.shape) == 2
                }
        if not found:
            raise NotApplicable("no module in it")
        return sorted(found)

    def module(self, end: str = "down_proj") -> str:
        """One module from the middle of the model, if there is one with a name that ends so."""
        modules = self.modules()
        named = [name for name in modules if name.endswith(end)] or modules
        return named[len(named) // 2]

    def parts(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module, by what follows its name."""
        with Checkpoint(self.folder) as checkpoint:
            return {
                name.removeprefix(f"{module}."): checkpoint.read(name).clone()
                for name in checkpoint.tensors
                if name.startswith(f"{module}.")
            }

    def source_weight(self, module: str) -> Tensor:
        """FP32 [out, in] of the source model."""
        with Checkpoint(self.source.folder) as checkpoint:
            return checkpoint.read(f"{module}.weight").float()

    def write(self, changes: Mapping[str, Tensor | None]) -> None:
        """Replaces tensors; None removes one, an unknown name adds one."""
        with Checkpoint(self.folder) as checkpoint:
            home = {name: tensor.file for name, tensor in checkpoint.tensors.items()}
        first = next(iter(sorted(set(home.values()))))
        by_file: dict[Path, dict[str, Tensor | None]] = {}
        for name, tensor in changes.items():
            by_file.setdefault(home.get(name, first), {})[name] = tensor
        for path, edits in by_file.items():
            with safe_open(path, framework="pt") as shard:
                tensors: dict[str, Tensor] = {n: shard.get_tensor(n) for n in shard.keys()}  # noqa: SIM118
            for name, edit in edits.items():
                tensors.pop(name, None)
                if edit is not None:
                    tensors[name] = edit.contiguous()
            self._save(path, tensors)

    def write_parts(self, module: str, parts: Mapping[str, Tensor]) -> None:
        """Replaces tensors of one module."""
        self.write({f"{module}.{part}": tensor for part, tensor in parts.items()})

    def reshard(self) -> None:
        """Two files where there was one; the same tensors."""
        path = sorted(self.folder.glob("*.safetensors"))[0]
        with safe_open(path, framework="pt") as shard:
            tensors: dict[str, Tensor] = {n: shard.get_tensor(n) for n in shard.keys()}  # noqa: SIM118
        names = sorted(tensors)
        files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        split = {files[0]: names[: len(names) // 2], files[1]: names[len(names) // 2 :]}
        path.unlink()
        for file, some in split.items():
            save_file(
                {name: tensors[name] for name in some},
                self.folder / file,
                metadata={"format": "pt"},
            )
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_json(
            self.folder / "model.safetensors.index.json",
            {
                "metadata": {"total_size": size},
                "weight_map": {name: file for file, some in split.items() for name in some},
            },
        )

    # --- files ---

    def edit_json(self, name: str, **changes: Any) -> None:
        """Changes keys of a JSON file; None removes one."""
        path = self.folder / name
        if not path.is_file():
            raise NotApplicable(f"no {name} in it")
        value = read_json(path) | changes
        self.write_json(name, {key: field for key, field in value.items() if field is not None})

    def write_json(self, name: str, value: object) -> None:
        write_json(self.folder / name, value)

    def configure(self, **changes: Any) -> None:
        """Changes quantization_config, in every file that has it."""
        config = read_json(self.folder / "config.json")
        if not config.get("quantization_config"):
            raise NotApplicable("config.json has no quantization_config")
        config["quantization_config"] |= changes
        self.write_json("config.json", config)
        if (self.folder / "quantize_config.json").is_file():
            self.edit_json("quantize_config.json", **changes)

    def remove(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise NotApplicable(f"no {name} in it")
        path.unlink()

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        # Never in place: the file may be a link to the sound artifact's.
        temporary = path.with_suffix(".partial")
        unshared = {n: t.clone() if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(unshared, temporary, metadata={"format": "pt"})
        temporary.replace(path)


def group_of_shuffled(num_in: int, group_size: int) -> Tensor:
    """[in] groups as an activation order would leave them: shuffled, of equal size."""
    groups = torch.arange(num_in) // group_size
    return groups[torch.randperm(num_in, generator=torch.Generator().manual_seed(11))]


def _link(source: str, target: str) -> None:
    if Path(source).name == MANIFEST_NAME:
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
