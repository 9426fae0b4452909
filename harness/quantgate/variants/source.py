"""The source model: what the user hands in, checked before any weight is touched."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

from quantgate.errors import SourceError
from quantgate.files import sha256_of_file, sha256_of_files

DEMO_MODEL = "demo"
INDEX_NAME = "model.safetensors.index.json"

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Everything a variant takes over byte for byte: how text becomes tokens, and when to stop.
SIDECAR_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """A checked folder of safetensors with its tokenizer."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]
    """sha256 of each file that makes up the model, by its name."""

    @property
    def sha256(self) -> str:
        return sha256_of_files(self.files)

    @property
    def weight_files(self) -> list[Path]:
        return weight_files(self.folder)

    @property
    def sidecars(self) -> list[Path]:
        return [self.folder / name for name in SIDECAR_FILES if (self.folder / name).is_file()]

    @property
    def is_tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))


def open_source(model: str) -> SourceModel:
    """Resolves `demo`, a local folder or a hub id, and refuses what cannot be judged.

    Raises:
        SourceError: not a causal LM, no tokenizer, pickle weights, remote code, quantized already.
    """
    folder = _resolve(model)
    config = _read_config(folder, model)
    _check_code(folder, config, model)
    _check_architecture(config, model)
    _check_weights(folder, model)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise SourceError(
            f"{model}: no tokenizer in the folder; expected one of {', '.join(_TOKENIZER_FILES)}. "
            "Save it beside the weights: tokenizer.save_pretrained(folder)."
        )
    names = ["config.json", *SIDECAR_FILES]
    paths = [folder / name for name in names if (folder / name).is_file()]
    paths += weight_files(folder)
    files = {path.name: sha256_of_file(path) for path in paths}
    return SourceModel(name=_name(model), folder=folder, config=config, files=files)


def demo_folder() -> Path:
    """The folder of the embedded demo model."""
    return Path(str(resources.files("quantgate") / "demo" / "model"))


def count_parameters(folder: Path) -> int:
    """Parameters stored in a folder of safetensors, read from the headers alone."""
    return sum(prod(entry["shape"]) for path in weight_files(folder) for entry in _tensors(path))


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load: those of the index, else model.safetensors, else all.

    A repository may carry the same weights a second time in another layout
    (consolidated.safetensors), which nobody here loads.

    Raises:
        SourceError: the index is broken, or names a file that is not there, or elsewhere.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        shards = _read_json_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise SourceError(f"{index}: no weight_map from tensors to files. Copy it again.")
        names = sorted(set(shards.values()))
        # No digest of this folder covers what lies elsewhere. (A hub's cache links to its blobs.)
        elsewhere = [n for n in names if Path(n).is_absolute() or ".." in Path(n).parts]
        if elsewhere:
            raise SourceError(
                f"{index}: names {elsewhere[0]}, which lies outside the folder. "
                "Copy it beside the others, and name it so."
            )
        paths = [folder / name for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise SourceError(
                f"{index}: names {', '.join(missing[:3])}, which the folder does not hold. "
                "Copy the missing files."
            )
        return paths
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _tensors(path: Path) -> list[dict[str, Any]]:
    """The header's entries, after checking that the file holds the bytes they promise."""
    # The safetensors header: eight bytes of little-endian length, then JSON.
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise SourceError(f"{path}: truncated; expected a safetensors header. Copy it again.")
        (length,) = struct.unpack("<Q", prefix)
        try:
            header = json.loads(file.read(min(length, size)))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise SourceError(
                f"{path}: not a safetensors file ({error}). Copy or save it again."
            ) from error
    if size < end:
        raise SourceError(
            f"{path}: truncated; it holds {size} bytes and its header says {end}. Copy it again."
        )
    return entries


def _name(model: str) -> str:
    """A name for people: the last part of a path or hub id (a hub cache's folder is a commit)."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else folder.name


def _resolve(model: str) -> Path:
    if model == DEMO_MODEL:
        return demo_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise SourceError(f"{model}: is a file; expected a folder with config.json and weights.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise SourceError(
            f"{model}: no such folder. Give a folder, a hub id such as org/name, or 'demo'."
        )
    return _download(model)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SourceError(
            f"{hub_id}: neither a folder here nor a model the hub could give ({error}). "
            "Download it first and give the folder."
        ) from error


def _read_config(folder: Path, model: str) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(
            f"{model}: no config.json in {folder}; expected a folder written by save_pretrained()."
        )
    return _read_json_object(path)


def _read_json_object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error}). Copy or save it again.") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: expected a JSON object.")
    return value


def _check_code(folder: Path, config: Mapping[str, Any], model: str) -> None:
    tokenizer = folder / "tokenizer_config.json"
    configs = {"config.json": config}
    if tokenizer.is_file():
        configs[tokenizer.name] = _read_json_object(tokenizer)
    for name, value in configs.items():
        if value.get("auto_map"):
            raise SourceError(
                f"{model}: {name} has auto_map, so loading would run code from the checkpoint "
                "(trust_remote_code), which quantgate never does. Use a model whose class is part "
                "of transformers."
            )


def _check_architecture(config: Mapping[str, Any], model: str) -> None:
    architectures = config.get("architectures") or []
    if config.get("is_encoder_decoder") or not any(
        str(name).endswith("ForCausalLM") for name in architectures
    ):
        found = ", ".join(map(str, architectures)) or "none"
        raise SourceError(
            f"{model}: not a causal language model (architectures: {found}); expected a class "
            "ending in ForCausalLM, such as LlamaForCausalLM."
        )
    if config.get("quantization_config"):
        raise SourceError(
            f"{model}: is quantized already, so it cannot be the source. Give the unquantized "
            "model as the source, and this folder as a variant with `path:`."
        )


def _check_weights(folder: Path, model: str) -> None:
    if any(folder.glob("*.safetensors")):
        count_parameters(folder)
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise SourceError(
            f"{model}: only pickle weights ({', '.join(pickles[:3])}), which can run code when "
            "loaded; expected *.safetensors. Convert them where you trust their origin: "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    raise SourceError(f"{model}: no weights in {folder}; expected *.safetensors.")
