"""What an artifact should hold: which weights its scheme quantizes, and which it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.audit.checkpoint import Checkpoint
from quantgate.errors import ArtifactError
from quantgate.files import read_json
from quantgate.variants.source import SourceModel

_METHOD_OF = {
    "bf16": "none",
    "int8-bnb": "bitsandbytes-8bit",
    "int4-nf4": "bitsandbytes-4bit",
    "int8-gptq": "gptq-8bit",
    "int4-gptq": "gptq-4bit",
}
_ARGUMENTS = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """The parts of a model that matter here, by the names in its checkpoint."""

    linears: frozenset[str]
    """Modules that quantizers replace, without the output head."""
    protected: frozenset[str]
    """Embeddings and the output head: modules that no scheme quantizes."""
    head: str | None
    input_embedding: str | None
    buffers: frozenset[str]
    """Tensors that are computed, not learned, such as rotary frequencies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What the artifact's config says about its weights."""

    method: str
    settings: Mapping[str, Any]
    skipped: tuple[str, ...]
    """Module names, or their ends, that it says were left alone."""
    problems: tuple[str, ...]

    def skips(self, module: str) -> bool:
        parts = module.split(".")
        return any(
            module == name or name in parts or module.endswith(f".{name}") for name in self.skipped
        )


def read_outline(source: SourceModel) -> ModelOutline:
    """Builds the source's model without weights, and names its parts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    protected = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)
    }
    if head is not None:
        protected.add(names[id(head)])
    linears = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    return ModelOutline(
        linears=frozenset(linears - protected),
        protected=frozenset(protected),
        head=names.get(id(head)),
        input_embedding=names.get(id(embedding)),
        buffers=frozenset(name for name, _ in model.named_buffers()),
    )


def eligible_modules(outline: ModelOutline, source: Checkpoint) -> frozenset[str]:
    """The source's modules that a quantizing scheme should quantize."""
    return frozenset(
        name
        for name in outline.linears
        if f"{name}.weight" in source and len(source[f"{name}.weight"].shape) == 2
    )


def read_declaration(folder: Path, scheme: str) -> Declaration:
    """Reads config.json, and quantize_config.json where there is one.

    Raises:
        ArtifactError: there is no readable config.json.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
        settings: dict[str, Any] = dict(config.get("quantization_config") or {})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}).") from error
    problems = []
    method = _method(settings)
    expected = _METHOD_OF[scheme]
    if method != expected:
        problems.append(f"config.json says {method}; scheme {scheme} is {expected}")
    other = folder / "quantize_config.json"
    if settings and other.is_file():
        # Other loaders read this file first.
        second = read_json(other)
        for key in _ARGUMENTS:
            if key in second and key in settings and second[key] != settings[key]:
                problems.append(
                    f"quantize_config.json says {key} {second[key]!r}, config.json "
                    f"{settings[key]!r}"
                )
    return Declaration(
        method=method, settings=settings, skipped=_skipped(settings), problems=tuple(problems)
    )


def _method(settings: Mapping[str, Any]) -> str:
    if not settings:
        return "none"
    method = str(settings.get("quant_method", "unknown"))
    if method == "bitsandbytes":
        if not settings.get("load_in_4bit"):
            return "bitsandbytes-8bit"
        kind = settings.get("bnb_4bit_quant_type", "nf4")
        return "bitsandbytes-4bit" if kind == "nf4" else f"bitsandbytes-4bit ({kind})"
    return f"{method}-{settings.get('bits')}bit"


def _skipped(settings: Mapping[str, Any]) -> tuple[str, ...]:
    names = list(settings.get("llm_int8_skip_modules") or [])
    names += list(settings.get("modules_to_not_convert") or [])
    return tuple(str(name) for name in names)
