"""The interface of a scheme: what it is asked to build, and what it says about it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantgate.errors import ArtifactError
from quantgate.files import read_json
from quantgate.variants.source import SourceModel

SCHEMES = ("bf16", "int8-bnb", "int8-gptq", "int4-nf4", "int4-gptq")
CALIBRATED_SCHEMES = ("int8-gptq", "int4-gptq")
DEFAULT_GROUP_SIZE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """Everything that decides an artifact's bytes."""

    scheme: str
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    calibration_ids: list[list[int]] = field(default_factory=list)
    """Token ids of each calibration document; empty for schemes that need none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildNotes:
    """What the tool said while building: kept in variant.json."""

    notes: Mapping[str, Any] = field(default_factory=dict)


def scheme_in_config(folder: Path) -> str:
    """The scheme that config.json's `quantization_config` describes; none at all means `bf16`.

    What no scheme here describes is returned in the config's own words, such as `awq, 4 bits`.

    Raises:
        ArtifactError: config.json cannot be read.
    """
    settings = quantization_settings(folder)
    if not settings:
        return "bf16"
    match settings:
        case {"quant_method": "bitsandbytes", "load_in_8bit": True}:
            return "int8-bnb"
        case {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}:
            return "int4-nf4"
        case {"quant_method": "gptq", "bits": 4 | 8 as bits}:
            return f"int{bits}-gptq"
    return f"{settings.get('quant_method', 'unknown')}, {settings.get('bits', 'unknown')} bits"


def quantization_settings(folder: Path) -> Mapping[str, Any]:
    """The `quantization_config` of an artifact's config.json; empty where there is none.

    Raises:
        ArtifactError: config.json is no JSON object, or that is none.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error}). Copy or save it again.") from error
    settings = config.get("quantization_config") or {} if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path}: expected a JSON object. Copy or save it again.")
    return settings


def copy_sidecars(source: SourceModel, out: Path) -> None:
    """Copies tokenizer, chat template and generation config byte for byte.

    Tools rewrite these files on saving (GPTQModel sets `do_sample` in generation_config.json), and
    a changed template or stop token is a quality fault that no weight explains.
    """
    for path in source.sidecars:
        shutil.copyfile(path, out / path.name)
