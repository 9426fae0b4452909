"""Quantizing with bitsandbytes through transformers: shared by int8-bnb and int4-nf4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quantgate.variants.scheme import BuildNotes, copy_sidecars
from quantgate.variants.source import SourceModel


def quantize_and_save(
    source: SourceModel, out: Path, *, config: Any, layer: type[torch.nn.Module], device: str
) -> BuildNotes:
    """Loads the source with a bitsandbytes config and saves what was quantized.

    Args:
        config: a BitsAndBytesConfig that names no modules to skip, since naming any drops the
            default protection of the output head and tied embeddings.
        layer: the Linear class that the scheme puts in.

    Raises:
        RuntimeError: nothing was quantized, or a protected module was.
    """
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
