"""Quantizing with bitsandbytes through transformers: shared by int8-bnb and int4-nf4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantgate.variants.scheme import BuildNotes, copy_sidecars
from quantgate.variants.source import SourceModel


def quantize_and_save(
    source: SourceModel,
    out: Path,
    *,
    config: Any,
    layer: type[torch.nn.Module],
    device: str,
    skip_modules: Sequence[str] = (),
) -> BuildNotes:
    """Loads the source with a bitsandbytes config and saves what was quantized.

    Args:
        config: a BitsAndBytesConfig that names no modules to skip.
        skip_modules: left in BF16, besides the output head and the embeddings.
        layer: the Linear class that the scheme puts in.

    Raises:
        RuntimeError: nothing was quantized, or a protected module was.
    """
    if skip_modules:
        config.llm_int8_skip_modules = protected_skip_list(skip_modules, source)
    model = AutoModelForCausalLM.from_pretrained(
        source.folder,
        quantization_config=config,
        dtype=torch.bfloat16,
        device_map={"": device},
        trust_remote_code=False,
        use_safetensors=True,
    )
    quantized = [name for name, module in model.named_modules() if isinstance(module, layer)]
    if not quantized:
        raise RuntimeError(
            f"no {layer.__name__} in the loaded model: nothing was quantized. "
            f"Model class {type(model).__name__} may have no Linear that bitsandbytes replaces."
        )
    if isinstance(model.get_output_embeddings(), layer):
        raise RuntimeError("the output head was quantized; expected it to be protected.")
    model.save_pretrained(out, safe_serialization=True)
    copy_sidecars(source, out)
    return BuildNotes(notes={"num_quantized_modules": len(quantized)})


def skipped_modules(option: object) -> list[str]:
    """The `skip_modules` option: names with commas between them."""
    return [name.strip() for name in str(option or "").split(",") if name.strip()]


def protected_skip_list(names: Sequence[str], source: SourceModel) -> list[str]:
    """A user's skip list with the output head and the embeddings in it.

    transformers drops its own protection of these as soon as any module is named.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        )
    ends = [model.get_output_embeddings(), model.get_input_embeddings()]
    protected = [name for name, module in model.named_modules() if any(module is e for e in ends)]
    return [*names, *(name for name in protected if name not in names)]
