"""Faults in what is quantized: too much, too little, the wrong module, the wrong vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantgate.audit.checkpoint import Checkpoint
from quantgate.drill.artifact import MutableArtifact, NotApplicable
from quantgate.drill.fault import EVERY, INT8, QUANTIZED, ArtifactFault, damage
from quantgate.drill.packing import pack_gptq, pack_int8, pack_nf4
from quantgate.files import read_json

_COVERAGE = "{id: coverage, metric: audit/coverage_difference.count, test: limit, max: 0 count}"
_WEIGHTS = "{id: weights, metric: audit/weight_error.ratio, test: limit, max: 1.4 x}"
_VOCABULARY = (
    "{id: vocabulary, metric: audit/vocabulary_difference.count, test: limit, max: 0 count}"
)


def coverage_faults() -> list[ArtifactFault]:
    return [
        damage("head-quantized", "a skip list that drops the output head's protection", QUANTIZED,
               _quantize_head, _COVERAGE),
        damage("embedding-int4", "embeddings (and a tied head) rounded to 4 bits", EVERY,
               _round_embedding(15), _WEIGHTS),
        damage("embedding-int8", "embeddings (and a tied head) rounded to 8 bits",
               ("bf16", "int8-gptq", *INT8), _round_embedding(254), _WEIGHTS),
        damage("not-quantized", "the source's weights under the scheme's name", QUANTIZED,
               _do_not_quantize, _COVERAGE),
        damage("partly-quantized", "one module skipped in silence", QUANTIZED,
               _skip_one, _COVERAGE),
        damage("neighbours-weights", "a layer loaded with the weights of the one before it", EVERY,
               _copy_neighbour, _WEIGHTS),
        damage("vocabulary-truncated", "the last 16 rows of the vocabulary cut off", EVERY,
               _truncate, _VOCABULARY),
        damage("vocabulary-permuted", "the vocabulary's rows moved on by one", EVERY,
               _permute, _WEIGHTS),
        damage("rope-table-bf16", "rotary frequencies stored in BF16", EVERY,
               _store_rotary, _COVERAGE),
    ]  # fmt: skip


def embedding_name(artifact: MutableArtifact) -> str:
    """The matrix with a row per token id, the input's first."""
    vocabulary = int(artifact.source.config.get("vocab_size", 0))
    with Checkpoint(artifact.folder) as checkpoint:
        found = [
            name
            for name, tensor in sorted(checkpoint.tensors.items())
            if len(tensor.shape) == 2 and tensor.shape[0] == vocabulary
        ]
    named = [name for name in found if "embed" in name] or found
    if not named:
        raise NotApplicable("no matrix with a row per token id")
    return named[0]


def round_embedding(artifact: MutableArtifact, *, steps: int) -> None:
    """Rounds each row to a symmetric grid of `steps` steps, stored in its own type."""
    name = embedding_name(artifact)
    with Checkpoint(artifact.folder) as checkpoint:
        stored = checkpoint.read(name)
    weight = stored.float()
    step = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) * 2 / steps
    artifact.write({name: (weight / step).round().mul(step).to(stored.dtype)})


def _round_embedding(steps: int) -> Callable[[MutableArtifact], None]:
    return lambda artifact: round_embedding(artifact, steps=steps)


def _quantize_head(artifact: MutableArtifact) -> None:
    embedding = embedding_name(artifact).removesuffix(".weight")
    weight = artifact.source_weight(embedding)
    parts: Mapping[str, Tensor]
    if artifact.scheme == "int8-bnb":
        parts = pack_int8(weight)
    elif artifact.scheme == "int4-nf4":
        parts = pack_nf4(weight)
    else:
        bits = 8 if artifact.scheme == "int8-gptq" else 4
        scales = artifact.parts(artifact.module("q_proj"))["scales"]
        size = artifact.source_weight(artifact.module("q_proj")).shape[1] // len(scales)
        parts = pack_gptq(weight, bits=bits, group_size=size)
    artifact.write({"lm_head.weight": None})
    artifact.write_parts("lm_head", parts)


def _plain(artifact: MutableArtifact, module: str) -> dict[str, Tensor | None]:
    changes: dict[str, Tensor | None] = {
        f"{module}.{part}": None for part in artifact.parts(module)
    }
    changes[f"{module}.weight"] = artifact.source_weight(module).bfloat16()
    return changes


def _do_not_quantize(artifact: MutableArtifact) -> None:
    changes: dict[str, Tensor | None] = {}
    for module in artifact.modules():
        changes |= _plain(artifact, module)
    artifact.write(changes)
    config = read_json(artifact.folder / "config.json")
    config.pop("quantization_config")
    artifact.write_json("config.json", config)


def _skip_one(artifact: MutableArtifact) -> None:
    artifact.write(_plain(artifact, artifact.module()))


def _copy_neighbour(artifact: MutableArtifact) -> None:
    module = artifact.module("q_proj")
    layers = sorted({name.split(".layers.")[1].split(".")[0] for name in artifact.modules()})
    if ".layers." not in module or len(layers) < 2:
        raise NotApplicable("it has no two layers")
    layer = module.split(".layers.")[1].split(".")[0]
    other = layers[layers.index(layer) - 1]
    prefix = module.split(f".layers.{layer}.")[0]
    parts = artifact.parts(f"{prefix}.layers.{other}")
    artifact.write_parts(f"{prefix}.layers.{layer}", parts)


def _truncate(artifact: MutableArtifact) -> None:
    name = embedding_name(artifact)
    vocabulary = int(artifact.source.config["vocab_size"])
    with Checkpoint(artifact.folder) as checkpoint:
        cut = {
            key: checkpoint.read(key)[:-16].clone()
            for key, tensor in checkpoint.tensors.items()
            if key in (name, "lm_head.weight") and tensor.shape[0] == vocabulary
        }
    artifact.write(cut)
    artifact.edit_json("config.json", vocab_size=vocabulary - 16)


def _permute(artifact: MutableArtifact) -> None:
    name = embedding_name(artifact)
    with Checkpoint(artifact.folder) as checkpoint:
        artifact.write({name: checkpoint.read(name).roll(1, 0)})


def _store_rotary(artifact: MutableArtifact) -> None:
    artifact.write(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.logspace(0, -4, 32).bfloat16()}
    )
