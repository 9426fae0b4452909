"""What stands beside the weights: tokenizer, template, generation config, config and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantgate.audit.checkpoint import Checkpoint
from quantgate.audit.declared import ModelOutline
from quantgate.errors import ArtifactError
from quantgate.files import read_json, sha256_of_file
from quantgate.variants.source import SIDECAR_FILES, SourceModel

_NOT_ARITHMETIC = frozenset(
    {
        "quantization_config", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
        "_attn_implementation", "architectures", "use_cache",
    }
)  # fmt: skip
"""Fields of a config that may differ between a source and its variant."""


def differing_files(source: SourceModel, folder: Path) -> list[str]:
    """Tokenizer, chat template and generation config that are not the source's, byte for byte."""
    found = []
    for name in SIDECAR_FILES:
        expected, path = source.files.get(name), folder / name
        if expected is None and path.is_file():
            found.append(f"{name} is added")
        elif expected is not None and not path.is_file():
            found.append(f"{name} is missing")
        elif expected is not None and sha256_of_file(path) != expected:
            found.append(f"{name} differs")
    return found


def differing_config(source: SourceModel, folder: Path) -> list[str]:
    """Fields of config.json, as transformers reads them, that change what the weights compute."""
    expected, found = _read_config(source.folder), _read_config(folder)
    keys = sorted((expected.keys() | found.keys()) - _NOT_ARITHMETIC)
    return [
        f"config.json: {key} is {found.get(key)!r}; the source has {expected.get(key)!r}"
        for key in keys
        if found.get(key) != expected.get(key)
    ]


def vocabulary_problems(
    source: SourceModel, folder: Path, checkpoint: Checkpoint, outline: ModelOutline
) -> list[str]:
    """Whether logits have one column for each id: the source's, and all that the tokenizer has."""
    expected = int(source.config.get("vocab_size", 0))
    problems = []
    for module in (outline.input_embedding, outline.head):
        name = f"{module}.weight"
        if module is None or name not in checkpoint:
            continue
        width = checkpoint[name].shape[0]
        if width != expected and checkpoint[name].dtype.is_floating_point:
            problems.append(f"{name} has {width} rows; the vocabulary has {expected}")
    largest = _largest_id(folder)
    if largest is not None and largest >= expected:
        problems.append(f"the tokenizer has id {largest}; logits have {expected} columns")
    return problems


def _read_config(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(
            folder, trust_remote_code=False
        ).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder}/config.json: cannot be read ({error}).") from error
    return config


def _largest_id(folder: Path) -> int | None:
    """The largest token id of tokenizer.json; None where the tokenizer is stored otherwise."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        value = read_json(path)
        vocabulary = value["model"]["vocab"]
        # A Unigram vocabulary is a list, in the order of its ids.
        ids = (
            list(vocabulary.values())
            if isinstance(vocabulary, Mapping)
            else list(range(len(vocabulary)))
        )
        ids += [int(token["id"]) for token in value.get("added_tokens", [])]
        return max(map(int, ids), default=None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a tokenizer ({error}).") from error
