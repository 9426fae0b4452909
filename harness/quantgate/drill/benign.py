"""Changes that do no harm: a gate that blocks one of these is a false alarm.

Harmless is what adds at most 5 % of the KL that rounding by the scheme itself causes (its healthy
twin's). An embedding in 8 bits adds 1 to 2 % of that in a 4-bit variant and is here; in an 8-bit
one it adds half as much again, and is in coverage_faults.py.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantgate.audit.checkpoint import Checkpoint
from quantgate.drill.artifact import MutableArtifact
from quantgate.drill.coverage_faults import round_embedding
from quantgate.drill.fault import (
    EVERY,
    GPTQ,
    INT4,
    AnyFault,
    ArtifactFault,
    CalibrationFault,
    GoldenFault,
    ServingFault,
)
from quantgate.files import write_text
from quantgate.quality.golden import ITEMS_NAME
from quantgate.variants.calibration import CalibrationSet


def benign_changes() -> list[AnyFault]:
    return [
        ServingFault(
            name="same-again", what="the same artifact, served and asked again (A/A)",
            schemes=EVERY, expected="none", is_harmful=False,
        ),
        ServingFault(
            name="other-batches", what="batches of at most 5 requests and 160 tokens",
            schemes=EVERY, expected="none", is_harmful=False,
            options={"max_batch_size": 5, "max_batched_tokens": 160},
        ),
        ArtifactFault(
            name="fp16-instead", what="a cast to FP16 instead of BF16", schemes=("bf16",),
            expected="none", is_harmful=False, plant=_cast_to_fp16,
        ),
        ArtifactFault(
            name="resharded", what="the same tensors in two files", schemes=EVERY,
            expected="none", is_harmful=False, plant=lambda artifact: artifact.reshard(),
        ),
        ArtifactFault(
            name="embedding-int8", what="embeddings (and a tied head) rounded to 8 bits",
            schemes=INT4, expected="none", is_harmful=False,
            plant=lambda artifact: round_embedding(artifact, steps=254),
        ),
        CalibrationFault(
            name="calibration-other",
            what="GPTQ in place of rounding at the same bits, on three quarters of the text",
            schemes=GPTQ, expected="none", is_harmful=False, change=_three_quarters,
        ),
        GoldenFault(
            name="items-shuffled", what="the golden items in another order", schemes=EVERY,
            expected="none", is_harmful=False, plant=_shuffle_items,
        ),
    ]  # fmt: skip


def _three_quarters(used: CalibrationSet) -> CalibrationSet:
    kept = [index for index in range(len(used.ids)) if index % 4]
    ids = [used.ids[index] for index in kept]
    return CalibrationSet(
        texts=[used.texts[index] for index in kept],
        ids=ids,
        provenance=replace(used.provenance, num_documents=len(ids), num_tokens=sum(map(len, ids))),
    )


def _shuffle_items(folder: Path) -> None:
    path = folder / ITEMS_NAME
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    random.Random(17).shuffle(lines)
    write_text(path, "\n".join(lines) + "\n")


def _cast_to_fp16(artifact: MutableArtifact) -> None:
    changes: dict[str, Tensor | None] = {}
    with Checkpoint(artifact.source.folder) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            if tensor.dtype.is_floating_point:
                changes[name] = checkpoint.read(name).to(torch.float16)
    artifact.write(changes)
    artifact.edit_json("config.json", dtype="float16")
