"""What a fault is: a small named object that says what it breaks, and who is expected to notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from quantgate.drill.artifact import MutableArtifact
from quantgate.variants.calibration import CalibrationSet

GPTQ = ("int8-gptq", "int4-gptq")
NF4 = ("int4-nf4",)
INT8 = ("int8-bnb",)
INT4 = ("int4-gptq", "int4-nf4")
QUANTIZED = (*GPTQ, *NF4, *INT8)
EVERY = ("bf16", *QUANTIZED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What all faults have in common; harmless changes are faults too, with `is_harmful` false."""

    name: str
    what: str
    schemes: tuple[str, ...]
    expected: str
    """The layer that should notice first; "none" for a harmless change."""
    advice: str = ""
    """A gate that notices it, to add to a policy that lets it through."""
    is_harmful: bool = True
    why_invisible: str = ""
    """Why gates may rightly not see it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFault(Fault):
    """Damage to a copy of a variant's files, under a manifest that is made to fit."""

    plant: Callable[[MutableArtifact], None]


def damage(
    name: str,
    what: str,
    schemes: tuple[str, ...],
    plant: Callable[[MutableArtifact], None],
    advice: str,
) -> ArtifactFault:
    """Damage to the stored weights, which the audit is expected to see."""
    return ArtifactFault(
        name=name, what=what, schemes=schemes, expected="audit", plant=plant, advice=advice
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SwappedFault(Fault):
    """Damage to a variant's files under the manifest of the sound ones."""

    plant: Callable[[MutableArtifact], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenFault(Fault):
    """A change to copies of the golden sets' folders, under their old locks."""

    plant: Callable[[Path], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFault(Fault):
    """Other calibration text; the variant is built again with it."""

    change: Callable[[CalibrationSet], CalibrationSet | None]
    """None for no calibration at all."""
    is_golden: bool = False
    """Calibrate on the golden items instead: `change` is not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSizeFault(Fault):
    """A group size that does not divide the model's widths."""

    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingFault(Fault):
    """A sound artifact, in processes with a fault in them, or served with other options."""

    planted: str | None = None
    """The name of the fault in drill/planted/sitecustomize.py; None for none."""
    options: Mapping[str, int] = field(default_factory=dict)
    """Server options that differ from the policy's."""
    is_server_only: bool = False
    """Planted where the model is served and not where it is scored offline, as a fault of the
    server's own code is."""
    is_in_reference: bool = False
    """The reference is served with the fault as well, as by an engine that has it."""


AnyFault: TypeAlias = (
    ArtifactFault | SwappedFault | GoldenFault | CalibrationFault | GroupSizeFault | ServingFault
)
