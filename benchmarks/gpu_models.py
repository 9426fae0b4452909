"""The models of the GPU benchmark: Llama shapes in each scheme.

Weights are random and made on the device: a checkpoint of 16 GB would take longer to write and read
than the benchmark runs. Speed does not depend on their values, except for LLM.int8's outliers.
"""

import gc
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from quantgate_serve.architecture import probe
from quantgate_serve.kv.storage import KVShape
from quantgate_serve.loading import LoadedModel, load

SCHEMES = ("bf16", "int8-bnb", "int4-nf4", "int8-gptq", "int4-gptq")
TINY = "tiny"
_SHAPES: dict[str, dict[str, Any]] = {
    TINY: {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    },
    # Llama 3.2 1B and Llama 3.1 8B.
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
}  # fmt: skip
_GPTQ_BITS = {"int8-gptq": 8, "int4-gptq": 4}


class SkippedScheme(Exception):
    """This machine lacks what the scheme needs; the message names it."""


def build_model(
    shape: str, scheme: str, *, device: torch.device, dtype: torch.dtype
) -> LoadedModel:
    """A Llama of random weights on `device`, its Linears as `scheme` stores them.

    Raises:
        SkippedScheme: a library is missing.
    """
    if scheme in _GPTQ_BITS:
        return _load_gptq(shape, _GPTQ_BITS[scheme], device=device, dtype=dtype)
    if scheme != "bf16" and find_spec("bitsandbytes") is None:
        raise SkippedScheme("bitsandbytes is not installed")
    config = _config_of(shape)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.requires_grad_(False)
    if scheme != "bf16":
        _quantize(model, scheme, device, dtype)
    model.eval()
    layout = probe(f"the {shape} shape", model)
    return LoadedModel(
        model=model,
        tokenizer=None,
        folder=Path(shape),
        device=device,
        dtype=dtype,
        kv_shape=KVShape(layout.num_layers, layout.num_kv_heads, layout.head_dim, dtype),
        context_length=int(config.max_position_embeddings),
        vocab_size=int(config.vocab_size),
        eos_ids=frozenset(),
        quantization=scheme,
    )


def _load_gptq(shape: str, bits: int, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """A checkpoint of random codes, read by the server's own loader, which picks the kernels."""
    config = _config_of(shape)
    group = min(128, config.hidden_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / shape
        folder.mkdir()
        with torch.device("meta"):
            plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        tensors: dict[str, torch.Tensor] = {}
        for key, tensor in plain.state_dict().items():
            if ".layers." in key and tensor.dim() == 2:
                prefix = key.removesuffix("weight")
                tensors |= _random_codes(prefix, tensor.shape, bits=bits, group=group)
            elif not (config.tie_word_embeddings and key.startswith("lm_head")):
                tensors[key] = torch.randn(tensor.shape).mul_(0.02).half()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True}
        settings |= {"desc_act": False, "checkpoint_format": "gptq"}
        values = config.to_dict() | {"quantization_config": settings}
        values["architectures"] = ["LlamaForCausalLM"]
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        return load(
            folder, device=str(device), dtype=str(dtype).removeprefix("torch."), attention="sdpa"
        )


def _random_codes(
    prefix: str, shape: torch.Size, *, bits: int, group: int
) -> dict[str, torch.Tensor]:
    """What AutoGPTQ stores of a weight [out, in]: zero points in the middle, one scale for all."""
    num_out, num_in = shape
    info = torch.iinfo(torch.int32)
    words = 32 // bits
    middle = (1 << (bits - 1)) - 1  # stored less one
    word = sum(middle << (bits * index) for index in range(words))
    zeros = torch.full((num_in // group, num_out // words), word, dtype=torch.int64)
    return {
        f"{prefix}qweight": torch.randint(
            info.min, info.max, (num_in // words, num_out), dtype=torch.int32
        ),
        f"{prefix}qzeros": zeros.to(torch.int32),
        f"{prefix}scales": torch.full((num_in // group, num_out), 0.1 / (1 << bits)).half(),
        f"{prefix}g_idx": (torch.arange(num_in) // group).to(torch.int32),
    }


def _config_of(shape: str) -> Any:
    return transformers.LlamaConfig(bos_token_id=0, eos_token_id=1, **_SHAPES[shape])


def _quantize(model: Any, scheme: str, device: torch.device, dtype: torch.dtype) -> None:
    """Put bitsandbytes' Linears in place of the layers' own, one after another."""
    import bitsandbytes

    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name == "lm_head":
            continue
        size = (linear.in_features, linear.out_features)
        new: Any
        if scheme == "int8-bnb":
            new = bitsandbytes.nn.Linear8bitLt(
                *size, bias=False, has_fp16_weights=False, threshold=6.0
            )
            new.weight = bitsandbytes.nn.Int8Params(
                linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
            )
        else:
            new = bitsandbytes.nn.Linear4bit(
                *size, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            new.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to(device))


def unload(loaded: LoadedModel) -> None:
    """Free the weights before the next scheme's are made."""
    for module in loaded.model.modules():
        module._parameters.clear()
        module._buffers.clear()
    gc.collect()
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
