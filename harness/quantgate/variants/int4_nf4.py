"""int4-nf4: bitsandbytes NF4, blocks of 64, scales quantized once more (double quantization)."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig

from quantgate.variants.bitsandbytes_model import quantize_and_save, skipped_modules
from quantgate.variants.scheme import BuildNotes, BuildRequest
from quantgate.variants.source import SourceModel


def build(source: SourceModel, out: Path, request: BuildRequest) -> BuildNotes:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=bool(request.options.get("double_quant", True)),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return quantize_and_save(
        source,
        out,
        config=config,
        layer=bnb.nn.Linear4bit,
        device=request.device,
        skip_modules=skipped_modules(request.options.get("skip_modules")),
    )
