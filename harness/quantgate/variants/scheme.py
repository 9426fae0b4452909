"""The interface of a scheme: what it is asked to build, and what it says about it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def copy_sidecars(source: SourceModel, out: Path) -> None:
    """Copies tokenizer, chat template and generation config byte for byte.

    Tools rewrite these files on saving (GPTQModel sets `do_sample` in generation_config.json), and
    a changed template or stop token is a quality fault that no weight explains.
    """
    for path in source.sidecars:
        shutil.copyfile(path, out / path.name)
