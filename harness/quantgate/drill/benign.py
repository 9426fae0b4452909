"""Changes that do no harm: a gate that blocks one of these is a false alarm."""

from __future__ import annotations

import torch
from torch import Tensor

from quantgate.audit.checkpoint import Checkpoint
from quantgate.drill.artifact import MutableArtifact
from quantgate.drill.coverage_faults import round_embedding
from quantgate.drill.fault import EVERY, QUANTIZED, AnyFault, ArtifactFault, ServingFault


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
            schemes=QUANTIZED, expected="none", is_harmful=False,
            plant=lambda artifact: round_embedding(artifact, steps=254),
        ),
    ]  # fmt: skip


def _cast_to_fp16(artifact: MutableArtifact) -> None:
    changes: dict[str, Tensor | None] = {}
    with Checkpoint(artifact.source.folder) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            if tensor.dtype.is_floating_point:
                changes[name] = checkpoint.read(name).to(torch.float16)
    artifact.write(changes)
    artifact.edit_json("config.json", dtype="float16")
