"""Which architectures the paged cache can hold, and a sentence for each that it cannot.

`check_config` reads config.json before any weight. `probe` then sends a few tokens through the
loaded model with a recording attention: what no config says is found at load, not by a client.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from quantgate_serve.model_folder import UnsupportedModelError

PROBE_NAME = "quantgate_probe"
_ADVICE = "Serve a full-attention decoder (Llama, Qwen, Mistral, Phi, OLMo, GPT-NeoX, …)."

# Arguments of an attention function that leave causal attention over all earlier tokens as it is.
# `sliding_window` is here because `check_config` has made sure that no request outgrows it.
_HARMLESS = {
    "dropout",
    "is_causal",
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
}
_MEANING = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "capped attention scores",
    "position_bias": "biased attention scores",
    "indices": "sparse attention",
}
_ALIBI = ("bloom", "mpt")

# Far above what a low-precision product differs between two batches, far below another token's.
_SAME_LOGITS = 0.1


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """What every layer of the model keeps of a token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def check_config(name: object, config: Any, *, context_length: int) -> None:
    """Refuse what config.json already shows. `name` is what messages call the model.

    Args:
        context_length: the longest sequence that will be served.

    Raises:
        UnsupportedModelError: with the reason.
    """
    text = config.get_text_config()
    reason = _not_a_text_decoder(config)
    if reason is None:
        kinds = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        kind = kinds[0] if isinstance(kinds, tuple) else kinds
        reason = (
            _not_attention_alone(kind, config)
            or _not_full_attention(text)
            or _not_reachable(kind)
            or _not_up_to(context_length, text)
        )
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason}")


def context_length_of(name: object, config: Any, *, limit: int | None) -> int:
    """The longest sequence to serve: the model's own, or `limit` where that is less.

    Raises:
        UnsupportedModelError: config.json states no length.
    """
    own = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0)
    if own <= 0:
        raise UnsupportedModelError(
            f"{name} states no max_position_embeddings, so it has no known context length. "
            "Add it to config.json."
        )
    return own if limit is None else min(own, limit)


def _not_a_text_decoder(config: Any) -> str | None:
    """Why this is no decoder of text alone, None if it is one."""
    kind = config.model_type
    if config.is_encoder_decoder:
        return f"is an encoder-decoder model ({kind}). Serve a decoder-only model."
    senses = [
        key.removesuffix("_config")
        for key in config.sub_configs
        if key.startswith(("vision", "audio", "image", "vq", "speech"))
        and getattr(config, key, None) is not None
    ]
    if senses:
        return (
            f"is a {kind} model, which wraps a language model for {' and '.join(senses)} input; "
            "this server takes text only. Save its language model alone, as a causal one."
        )
    if getattr(config, "add_cross_attention", False) or getattr(
        config.get_text_config(), "cross_attention_layers", None
    ):
        return f"attends to a second input (cross-attention). {_ADVICE}"
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        return (
            f"is not a causal language model ({kind}). "
            "Serve a model that AutoModelForCausalLM can load."
        )
    architectures = config.architectures or []
    if architectures and not any(
        name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
        for name in architectures
    ):
        return (
            f"holds {architectures[0]}, which is not a causal language model. "
            "Serve a model whose config.json names an architecture ending in ForCausalLM."
        )
    return None


def _not_attention_alone(kind: Any, config: Any) -> str | None:
    """What a model of class `kind` knows of earlier tokens besides plain attention."""
    if kind._is_stateful:
        return (
            f"keeps a recurrent state besides its attention ({kind.__name__}: state-space or "
            f"linear-attention layers), which the paged cache does not have. {_ADVICE}"
        )
    if getattr(config, "alibi", False) or config.model_type in _ALIBI:
        return (
            "biases its attention by distance (ALiBi), which the paged attention does not have. "
            + _ADVICE
        )
    return None


def _not_reachable(kind: Any) -> str | None:
    """Why our attention cannot stand in for that of class `kind`."""
    if not kind._supports_sdpa:
        return (
            f"is a {kind.__name__}, whose attention is more than a scaled dot product (attention "
            f"sinks, for example), which the paged attention does not have. {_ADVICE}"
        )
    if not kind._supports_attention_backend:
        return (
            f"is a {kind.__name__}, which does not use transformers' attention interface, so it "
            f"cannot reach a paged cache. {_ADVICE}"
        )
    if "logits_to_keep" not in inspect.signature(kind.forward).parameters:
        return (
            f"is a {kind.__name__}, which computes logits for every position only "
            f"(no logits_to_keep). {_ADVICE}"
        )
    return None


def _not_full_attention(text: Any) -> str | None:
    """Which attention the model has that the paged cache has not, None if there is none."""
    layer_types = set(getattr(text, "layer_types", None) or ())
    other = layer_types - {"full_attention", "sliding_attention"}
    if other:
        return f"has layers of type {sorted(other)}, which the paged cache does not have. {_ADVICE}"
    if getattr(text, "kv_lora_rank", None):
        return (
            f"uses multi-head latent attention (kv_lora_rank {text.kv_lora_rank}), which the paged "
            f"cache does not have yet. {_ADVICE}"
        )
    if getattr(text, "attn_logit_softcapping", None):
        return (
            f"caps its attention scores (attn_logit_softcapping {text.attn_logit_softcapping}), "
            f"which the paged attention does not have yet. {_ADVICE}"
        )
    if getattr(text, "num_kv_shared_layers", None):
        return (
            f"shares keys and values between layers (num_kv_shared_layers "
            f"{text.num_kv_shared_layers}), which the paged cache does not have. {_ADVICE}"
        )
    return None


def _not_up_to(context_length: int, text: Any) -> str | None:
    """Why sequences of `context_length` tokens cannot be served, though shorter ones can."""
    window = getattr(text, "sliding_window", None)
    layer_types = set(getattr(text, "layer_types", None) or ())
    if window and window < context_length and layer_types != {"full_attention"}:
        return (
            f"uses sliding-window attention (window {window}), which the paged cache does not have "
            f"yet. Up to {window} tokens the window changes nothing: serve it with "
            f"--max-context {window}, or serve a full-attention model."
        )
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for settings in nested or [rope]:
        if settings.get("rope_type") not in ("dynamic", "longrope"):
            continue
        stable = int(
            settings.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
            or text.max_position_embeddings
        )
        if context_length > stable:
            return (
                f"uses {settings['rope_type']!r} rotary positions, which beyond {stable} tokens "
                "depend on the longest sequence of a batch, so requests would depend on each "
                f"other. Serve it with --max-context {stable}, or serve another model."
            )
    return None


@dataclass(slots=True)
class _Calls:
    """What the probing attention saw: a line per fault, the layers and their shapes."""

    layers: list[int] = field(default_factory=list)
    shapes: set[tuple[int, int]] = field(default_factory=set)  # (key heads, head dim)
    faults: list[str] = field(default_factory=list)


@torch.inference_mode()
def probe(name: object, model: Any) -> AttentionLayout:
    """Run `model` on four tokens, and say what its cache must hold.

    The probing attention lets each token see only itself, so that nothing else may mix tokens.

    Raises:
        UnsupportedModelError: attention, positions or something beside them is not as the paged
            cache needs it.
    """
    AttentionInterface.register(PROBE_NAME, _probing_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(PROBE_NAME)
    calls = _Calls()
    try:
        row = _logits(model, calls, ids=(2, 3, 4, 5), positions=(0, 1, 2, 3))[2]
        other = _logits(model, _Calls(), ids=(6, 4), positions=(7, 2))[1]
    finally:
        model.set_attn_implementation(before)
    layers = int(model.config.get_text_config().num_hidden_layers)
    kind = type(model).__name__
    if calls.faults:
        raise UnsupportedModelError(f"{name} ({kind}) {calls.faults[0]}. {_ADVICE}")
    if sorted(calls.layers) != list(range(layers)):
        raise UnsupportedModelError(
            f"{name} ({kind}) has {layers} layers, but attention was reached by "
            f"{_listed(calls.layers)}: others keep something that the paged cache does not hold. "
            + _ADVICE
        )
    if len(calls.shapes) != 1:
        raise UnsupportedModelError(
            f"{name} ({kind}) has layers of unlike size (key heads, head dim): "
            f"{sorted(calls.shapes)}, and the paged cache holds one size. {_ADVICE}"
        )
    # Weights that give no finite number are served as they are: judging them is not done here.
    is_finite = bool(torch.isfinite(row - other).all())
    if is_finite and float((row - other).abs().max()) > _SAME_LOGITS * float(row.std()):
        raise UnsupportedModelError(
            f"{name} ({kind}) computes a token from more than itself, its position and attention "
            "(a convolution or state across tokens, or positions of its own), so sequences cannot "
            f"share a step. {_ADVICE}"
        )
    ((num_kv_heads, head_dim),) = calls.shapes
    return AttentionLayout(layers, num_kv_heads, head_dim)


def _logits(
    model: Any, calls: _Calls, *, ids: tuple[int, ...], positions: tuple[int, ...]
) -> Tensor:
    output = model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        use_cache=False,
        quantgate_probe=calls,
    )
    logits: Tensor = output.logits[0].float()
    return logits


def _probing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    quantgate_probe: _Calls | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Each token's own value, stirred with its query so that its position shows, and bounded.

    Args:
        query: [1, N, T, D]; `key` [1, K, T, D], `value` [1, K, T, D].
    """
    num_heads = query.shape[1]
    if quantgate_probe is not None:
        quantgate_probe.faults += _faults(module, query, key, value, attention_mask, options)
        quantgate_probe.layers.append(int(getattr(module, "layer_idx", None) or 0))
        quantgate_probe.shapes.add((key.shape[1], key.shape[3]))
    values = value.repeat_interleave(max(1, num_heads // value.shape[1]), dim=1)
    stirred = values[:, :num_heads, : query.shape[2]] + query[..., : value.shape[3]].tanh()
    return stirred.transpose(1, 2).contiguous(), None


def _faults(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> list[str]:
    """What is wrong with one call, in words that follow the model's name."""
    found = [
        f"passes {key}= to its attention ({_MEANING.get(key, 'unknown here')}), "
        "which the paged attention does not have"
        for key, value in options.items()
        if value is not None and key not in _HARMLESS and not key.startswith("output_")
    ]
    if key.shape != value.shape:
        found.append(
            f"has keys of {key.shape[3]} and values of {value.shape[3]} numbers per head, and the "
            "paged cache holds one size"
        )
    if key.shape[2] != query.shape[2]:
        found.append("attends to a second input (cross-attention)")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        found.append("attends to later tokens too (is_causal is False)")
    if attention_mask is not None:
        found.append("builds an attention mask of its own")
    if not isinstance(getattr(module, "layer_idx", None), int):
        found.append(f"does not number its attention layers ({type(module).__name__})")
    return found


def _listed(layers: list[int]) -> str:
    if not layers:
        return "none"
    return "layers " + ", ".join(map(str, sorted(layers)[:8])) + (" …" if len(layers) > 8 else "")
