"""Loads a folder of safetensors as a causal language model, or says in one sentence why not.

How the weights are quantized is read from config.json, never from a name.
"""

import inspect
import json
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from quantgate_serve.gptq import GptqFormatError, load_gptq
from quantgate_serve.kv.storage import KVShape


class UnsupportedModelError(Exception):
    """The folder cannot be served; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with the facts the engine needs about it."""

    model: Any
    tokenizer: Any
    folder: Path
    device: torch.device
    dtype: torch.dtype
    kv_shape: KVShape
    context_length: int
    vocab_size: int
    eos_ids: frozenset[int]
    quantization: str

    @property
    def weight_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in [*self.model.parameters(), *self.model.buffers()]
        )


def load(folder: Path, *, device: str, dtype: str, attention: str) -> LoadedModel:
    """Load `folder` onto `device`.

    Args:
        device: `auto`, `cpu` or `cuda:N`.
        dtype: arithmetic, `auto` (FP32 on CPU, the variant's own on CUDA) or a torch name.
        attention: transformers' name of the attention to use.

    Raises:
        UnsupportedModelError: the folder is not something this server can serve.
    """
    check_folder(folder)
    config = _read_config(folder)
    chosen_device = choose_device(device)
    chosen_dtype = _choose_dtype(dtype, chosen_device, config)
    quantization = _quantization_of(config)
    tokenizer = _load_tokenizer(folder)
    model = _load_weights(
        folder,
        config,
        quantization,
        device=chosen_device,
        dtype=chosen_dtype,
        attention=attention,
    )
    text_config = config.get_text_config()
    _check_forward(model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        device=chosen_device,
        dtype=chosen_dtype,
        kv_shape=_kv_shape(text_config, chosen_dtype),
        context_length=int(text_config.max_position_embeddings),
        vocab_size=int(text_config.vocab_size),
        eos_ids=_eos_ids(model, tokenizer),
        quantization=quantization,
    )


def choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError(f"--device {device}: no CUDA device is visible. Use cpu.")
    return chosen


def check_folder(folder: Path) -> None:
    """Refuse what can be refused without reading weights."""
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} has no config.json: it is not a model folder. "
            "Pass a folder written by save_pretrained."
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        if pickles:
            raise UnsupportedModelError(
                f"{folder} holds only pickle weights ({pickles[0]}), which can run code when "
                "loaded. Convert it with save_pretrained(..., safe_serialization=True)."
            )
        raise UnsupportedModelError(
            f"{folder} has no *.safetensors file. Pass a folder that holds the weights."
        )


def _read_config(folder: Path) -> Any:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{folder} needs trust_remote_code ({raw['auto_map']}), and this server runs "
            "no code from a model folder. Use a model that transformers itself implements."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{folder}/config.json: transformers {transformers.__version__} does not know "
            f"model_type {raw.get('model_type')!r} ({error}). Use a model that it implements."
        ) from error
    _check_architecture(folder, config)
    return config


def _check_architecture(folder: Path, config: Any) -> None:
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{folder} is an encoder-decoder model ({config.model_type}). "
            "Serve a decoder-only model."
        )
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"{folder} is not a causal language model ({config.model_type}). "
            "Serve a model that AutoModelForCausalLM can load."
        )
    architectures = config.architectures or []
    if architectures and not any(
        name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
        for name in architectures
    ):
        raise UnsupportedModelError(
            f"{folder} holds {architectures[0]}, which is not a causal language model. "
            "Serve a model whose config.json names an architecture ending in ForCausalLM."
        )
    context = int(getattr(text, "max_position_embeddings", 0) or 0)
    if context <= 0:
        raise UnsupportedModelError(
            f"{folder} states no max_position_embeddings, so it has no known context length. "
            "Add it to config.json."
        )
    window = getattr(text, "sliding_window", None)
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    if (window is not None and window < context and layer_types != {"full_attention"}) or (
        window is not None and window < context and not getattr(text, "layer_types", None)
    ):
        raise UnsupportedModelError(
            f"{folder} uses sliding-window attention (window {window}), which the paged "
            "cache does not have yet. Serve a full-attention model."
        )
    other = layer_types - {"full_attention", "sliding_attention"}
    if other:
        raise UnsupportedModelError(
            f"{folder} has layers of type {sorted(other)}, which the paged cache does not have. "
            "Serve a full-attention model."
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{folder} uses multi-head latent attention (kv_lora_rank {text.kv_lora_rank}), which "
            "the paged cache does not have yet. Serve a full-attention model."
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedModelError(
            f"{folder} caps its attention scores (attn_logit_softcapping "
            f"{text.attn_logit_softcapping}), which the paged attention does not have yet. "
            "Serve a model without it."
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"{folder} uses {rope['rope_type']!r} rotary positions, which depend on the longest "
            "sequence of a batch, so requests would depend on each other. "
            "Serve a model without them."
        )


def _quantization_settings(config: Any) -> dict[str, Any]:
    """`quantization_config` of config.json, empty when the weights are plain."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return {}
    values: dict[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()
    return values


def _quantization_of(config: Any) -> str:
    """`none`, `bitsandbytes-8bit`, `bitsandbytes-4bit` or `gptq`, from config.json."""
    values = _quantization_settings(config)
    if not values:
        return "none"
    method = str(values.get("quant_method", ""))
    if method == "bitsandbytes":
        return "bitsandbytes-4bit" if values.get("load_in_4bit") else "bitsandbytes-8bit"
    if method == "gptq":
        return "gptq"
    raise UnsupportedModelError(
        f"config.json asks for quantization method {method!r}. "
        "Known here: bitsandbytes (8-bit, 4-bit) and gptq."
    )


def _choose_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    if dtype != "auto":
        chosen = getattr(torch, dtype, None)
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise UnsupportedModelError(
                f"--dtype {dtype} is no floating-point type. "
                "Use auto, float32, bfloat16 or float16."
            )
        return chosen
    if device.type == "cpu":
        # Few CPUs have BF16 arithmetic; the weights keep the variant's rounded values.
        return torch.float32
    own = getattr(config.get_text_config(), "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.bfloat16


def _load_tokenizer(folder: Path) -> Any:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        raise UnsupportedModelError(
            f"{folder} has no tokenizer (looked for {', '.join(names)}). "
            "Copy the tokenizer's files next to the weights."
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(
            f"{folder}: the tokenizer cannot be loaded ({error}). Copy a complete tokenizer there."
        ) from error


def _load_weights(
    folder: Path,
    config: Any,
    quantization: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
) -> Any:
    if quantization == "gptq" and not _has_fast_gptq(device):
        try:
            model = load_gptq(
                folder, config, _quantization_settings(config), dtype=dtype, attention=attention
            )
        except GptqFormatError as error:
            raise UnsupportedModelError(
                f"{folder} is not a GPTQ checkpoint that this server reads: {error}. "
                "Quantize it again with bits 4 or 8 and the gptq format."
            ) from error
        model = model.to(device)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            device_map={"": device} if quantization != "none" else None,
            use_safetensors=True,
            trust_remote_code=False,
        )
        if quantization == "none":
            model = model.to(device)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if quantization.startswith("bitsandbytes"):
        _settle_bitsandbytes(model, device, dtype)
    return model


def _has_fast_gptq(device: torch.device) -> bool:
    """GPTQModel's CUDA kernels, where they are installed. Its CPU kernel is BF16 only."""
    if device.type != "cuda":
        return False
    return all(find_spec(name) is not None for name in ("gptqmodel", "optimum"))


def _settle_bitsandbytes(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make bitsandbytes compute in the type that was asked for, and stop its warning per call."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for parameter in model.parameters():
        # What is not quantized keeps the type it was stored in, whatever from_pretrained is told.
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    if device.type != "cpu" or dtype != torch.float32:
        return
    module: Any
    for module in model.modules():
        # On CPUs with AVX512-BF16 the 4-bit kernel computes in BF16 whatever the input's type is.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
            module.compute_type_is_set = True


def _check_forward(model: nn.Module) -> None:
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface, so it cannot reach a paged "
            "cache. Serve a model that does (Llama, Qwen, Mistral, Gemma, GPT-NeoX, …)."
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name} computes logits for every position only (no logits_to_keep). "
            "Serve another model."
        )


def _kv_shape(config: Any, dtype: torch.dtype) -> KVShape:
    heads = int(config.num_attention_heads)
    return KVShape(
        num_layers=int(config.num_hidden_layers),
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        dtype=dtype,
    )


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids in generation_config.json, else config.json, else the tokenizer's."""
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
