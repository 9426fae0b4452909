"""int8-bnb: LLM.int8() of bitsandbytes, vector-wise INT8 with outlier columns kept in FP16.

Outlier columns are chosen over the flattened batch, so outputs depend on batch mates: the served
path is what the gates judge.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
from transformers import BitsAndBytesConfig

from quantgate.variants.bitsandbytes_model import quantize_and_save, skipped_modules
from quantgate.variants.scheme import BuildNotes, BuildRequest
from quantgate.variants.source import SourceModel


def build(source: SourceModel, out: Path, request: BuildRequest) -> BuildNotes:
    config = BitsAndBytesConfig(
        load_in_8bit=True,
        llm_int8_threshold=float(request.options.get("llm_int8_threshold", 6.0)),
    )
    return quantize_and_save(
        source,
        out,
        config=config,
        layer=bnb.nn.Linear8bitLt,
        device=request.device,
        skip_modules=skipped_modules(request.options.get("skip_modules")),
    )
