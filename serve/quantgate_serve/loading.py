"""Loads a folder of safetensors as a causal language model, or says in one sentence why not.

How the weights are quantized is read from config.json, never from a name.
"""

import json
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from quantgate_serve import llm_int8
from quantgate_serve.architecture import check_config, context_length_of, probe
from quantgate_serve.gptq import GptqFormatError, load_gptq
from quantgate_serve.kv.storage import KVShape
from quantgate_serve.model_folder import UnsupportedModelError, check_folder

__all__ = ["LoadedModel", "UnsupportedModelError", "choose_device", "load"]


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


def load(
    folder: Path, *, device: str, dtype: str, attention: str, max_context: int | None = None
) -> LoadedModel:
    """Load `folder` onto `device`.

    Args:
        device: `auto`, `cpu` or `cuda:N`.
        dtype: arithmetic, `auto` (FP32 on CPU, the variant's own on CUDA) or a torch name.
        attention: transformers' name of the attention to use.
        max_context: serve no longer sequences than this; None serves the model's whole context.

    Raises:
        UnsupportedModelError: the folder is not something this server can serve.
    """
    check_folder(folder)
    config = _read_config(folder)
    context_length = context_length_of(folder, config, limit=max_context)
    check_config(folder, config, context_length=context_length)
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
    layout = probe(folder, model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        device=chosen_device,
        dtype=chosen_dtype,
        kv_shape=KVShape(
            layout.num_layers, layout.num_kv_heads, layout.head_dim, dtype=chosen_dtype
        ),
        context_length=context_length,
        vocab_size=int(config.get_text_config().vocab_size),
        eos_ids=_eos_ids(model, tokenizer),
        quantization=quantization,
    )


def choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"--device {device} is no device. Use auto, cpu or cuda:N."
        ) from error
    if chosen.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(
            f"--device {device}: {chosen.type} is not served. Use auto, cpu or cuda:N."
        )
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError(f"--device {device}: no CUDA device is visible. Use cpu.")
    return chosen


def _read_config(folder: Path) -> Any:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(
            f"{folder}/config.json is not JSON ({error}). Copy the whole model there again."
        ) from error
    if not isinstance(raw, dict):
        raise UnsupportedModelError(
            f"{folder}/config.json holds a {type(raw).__name__}, expected an object. "
            "Copy the whole model there again."
        )
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
    return config


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
    llm_int8.replace_all(model)


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids in generation_config.json, else config.json, else the tokenizer's."""
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
