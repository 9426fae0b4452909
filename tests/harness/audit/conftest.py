"""A tiny source model and healthy artifacts of every scheme, packed by rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from quantgate.audit.declared import ModelOutline, read_outline
from quantgate.audit.report import AuditReport
from quantgate.audit.weights import audit_artifact
from quantgate.drill.packing import pack_gptq, pack_int8, pack_nf4
from quantgate.files import read_json, write_json
from quantgate.variants.manifest import Calibration, VariantManifest, digest_files
from quantgate.variants.scheme import CALIBRATED_SCHEMES, copy_sidecars
from quantgate.variants.source import SourceModel, open_source

GROUP_SIZE = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8-bnb": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "int4-nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    },
} | {
    f"int{bits}-gptq": {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP_SIZE,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    for bits in (4, 8)
}


@dataclass(frozen=True)
class Artifact:
    """A variant's folder, free to be damaged."""

    folder: Path
    scheme: str
    source: SourceModel
    outline: ModelOutline

    def edit(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Lets `change` work on all tensors, and writes them back."""
        path = self.folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def configure(self, **changes: object) -> None:
        """Changes fields of quantization_config."""
        config = read_json(self.folder / "config.json")
        config["quantization_config"] |= changes
        write_json(self.folder / "config.json", config)

    @property
    def manifest(self) -> VariantManifest:
        is_calibrated = self.scheme in CALIBRATED_SCHEMES
        return VariantManifest(
            scheme=self.scheme,
            files=digest_files(self.folder),
            source_sha256=self.source.sha256,
            calibration=Calibration(path="c", sha256="0", num_documents=9, num_tokens=900)
            if is_calibrated
            else None,
            notes={"calibration_surprise": 0.5} if is_calibrated else {},
        )

    def audit(self) -> AuditReport:
        return audit_artifact(self.source, self.outline, self.folder, self.manifest)


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(str(write_source(tmp_path_factory.mktemp("source"), is_tied=request.param)))


@pytest.fixture(scope="session")
def untied_source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(str(write_source(tmp_path_factory.mktemp("untied"), is_tied=False)))


def write_source(folder: Path, *, is_tied: bool) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=len(letters), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=is_tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    fast.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Artifact]:
    """Writes a healthy artifact; `pack` replaces how one weight is packed."""

    def write(
        source: SourceModel,
        scheme: str,
        pack: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
        **settings: object,
    ) -> Artifact:
        folder = tmp_path / scheme
        folder.mkdir()
        outline = read_outline(source)
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(source.weight_files[0]).items():
            module = name.removesuffix(".weight")
            if module in outline.linears and scheme != "bf16":
                parts = (pack or PACKERS[scheme])(tensor)
                tensors |= {f"{module}.{part}": value for part, value in parts.items()}
            else:
                tensors[name] = tensor.bfloat16()
        save_file(tensors, folder / "model.safetensors")
        quantization = SETTINGS[scheme] | settings
        config = dict(source.config) | (
            {"quantization_config": quantization} if quantization else {}
        )
        write_json(folder / "config.json", config)
        copy_sidecars(source, folder)
        return Artifact(folder=folder, scheme=scheme, source=source, outline=outline)

    return write


PACKERS: dict[str, Callable[[Tensor], Mapping[str, Tensor]]] = {
    "int8-bnb": pack_int8,
    "int4-nf4": pack_nf4,
    "int4-gptq": lambda weight: pack_gptq(weight, bits=4, group_size=GROUP_SIZE),
    "int8-gptq": lambda weight: pack_gptq(weight, bits=8, group_size=GROUP_SIZE),
}
