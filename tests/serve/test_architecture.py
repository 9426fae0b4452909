"""What cannot be served is refused at load, each with its own reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quantgate_serve.architecture import _not_reachable, check_config, context_length_of, probe
from quantgate_serve.model_folder import UnsupportedModelError

ConfigOf = Callable[..., Any]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

REFUSED_BY_CONFIG: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder_decoder": ("T5Config", {}, "encoder-decoder model"),
    "cross_attention": ("GPT2Config", {"add_cross_attention": True}, "cross-attention"),
    "embedding_model": ("SiglipTextConfig", {}, "not a causal language model"),
    "classifier": (
        "LlamaConfig",
        {"architectures": ["LlamaForSequenceClassification"]},
        "holds LlamaForSequenceClassification",
    ),
    "vision": ("Gemma3Config", {}, "wraps a language model for vision input"),
    "vision_and_audio": ("Gemma3nConfig", {}, "for vision and audio input"),
    "state_space": ("MambaConfig", {}, "keeps a recurrent state"),
    "hybrid": ("JambaConfig", {}, "keeps a recurrent state"),
    "linear_attention": ("Qwen3NextConfig", {}, "keeps a recurrent state"),
    "alibi": ("BloomConfig", {}, "ALiBi"),
    "alibi_option": ("FalconConfig", {"alibi": True}, "ALiBi"),
    "no_interface": ("FalconConfig", {}, "does not use transformers' attention interface"),
    "stablelm": ("StableLmConfig", {}, "does not use transformers' attention interface"),
    "sinks": ("GptOssConfig", {}, "attention sinks"),
    "convolution": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, r"\['conv'\]"),
    "chunked": ("Llama4TextConfig", {}, "chunked_attention"),
    "window": ("MistralConfig", {"sliding_window": 255}, r"\(window 255\).*--max-context 255"),
    "some_windows": ("Gemma3TextConfig", {"sliding_window": 64}, r"\(window 64\)"),
    "latent": ("DeepseekV3Config", {"kv_lora_rank": 16}, r"latent attention \(kv_lora_rank 16\)"),
    "softcap": (
        "Gemma2Config",
        {"sliding_window": 256},
        r"caps its attention scores \(attn_logit_softcapping 50.0\)",
    ),
    "shared_cache": (
        "Gemma3nTextConfig",
        {"sliding_window": 256, "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1},
        "shares keys and values between layers",
    ),
    "dynamic_rope": (
        "LlamaConfig",
        {"rope_parameters": DYNAMIC | {"original_max_position_embeddings": 255}},
        "beyond 255 tokens depend on the longest sequence.*--max-context 255",
    ),
    "dynamic_rope_of_one_layer_type": (
        "Gemma3TextConfig",
        {
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {
                "full_attention": DYNAMIC | {"original_max_position_embeddings": 255},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "beyond 255 tokens depend on the longest sequence",
    ),
}


def tiny(config_of: ConfigOf, kind: str, changes: dict[str, Any]) -> Any:
    """A configuration of two small layers; composite and encoder ones as small as they come."""
    composite = {"T5Config", "Gemma3Config", "Gemma3nConfig", "SiglipTextConfig"}
    of_its_own = {"JambaConfig", "MambaConfig", "Llama4TextConfig", "Qwen3NextConfig"}
    if kind in composite | of_its_own:
        return getattr(transformers, kind)(**changes)
    return config_of(getattr(transformers, kind), **changes)


@pytest.mark.parametrize("case", REFUSED_BY_CONFIG)
def test_config_json_alone_refuses(case: str, config_of: ConfigOf) -> None:
    kind, changes, message = REFUSED_BY_CONFIG[case]
    config = tiny(config_of, kind, changes)
    with pytest.raises(UnsupportedModelError, match=f"^the model .*{message}"):
        check_config("the model", config, context_length=256)


@pytest.mark.parametrize(
    ("kind", "changes", "context_length"),
    [
        ("MistralConfig", {"sliding_window": 256}, 256),
        ("MistralConfig", {"sliding_window": 64}, 64),
        ("Qwen2Config", {"sliding_window": 64}, 256),  # use_sliding_window is off
        ("LlamaConfig", {"rope_parameters": DYNAMIC}, 256),
        (
            "LlamaConfig",
            {"rope_parameters": DYNAMIC | {"original_max_position_embeddings": 64}},
            64,
        ),
    ],
)
def test_what_never_bites_within_the_context_is_no_reason(
    kind: str, changes: dict[str, Any], context_length: int, config_of: ConfigOf
) -> None:
    config = config_of(getattr(transformers, kind), **changes)
    check_config("the model", config, context_length=context_length)


@pytest.mark.parametrize(("limit", "expected"), [(None, 256), (257, 256), (256, 256), (255, 255)])
def test_the_context_is_the_models_or_the_limit_whichever_is_less(
    limit: int | None, expected: int, config_of: ConfigOf
) -> None:
    config = config_of(transformers.LlamaConfig)
    assert context_length_of("the model", config, limit=limit) == expected


def test_a_model_without_a_stated_context_is_refused(config_of: ConfigOf) -> None:
    config = config_of(transformers.LlamaConfig, max_position_embeddings=0)
    with pytest.raises(UnsupportedModelError, match="states no max_position_embeddings"):
        context_length_of("the model", config, limit=None)


def build(config_of: ConfigOf, kind: str, **changes: Any) -> Any:
    torch.manual_seed(7)
    config = config_of(getattr(transformers, kind), **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("BertConfig", {}, r"attends to later tokens too \(is_causal is False\)"),
        ("DogeConfig", {}, "builds an attention mask of its own"),
        (
            "DiffLlamaConfig",
            {"num_key_value_heads": 4},
            "attention was reached by layers 0, 0, 1, 1",
        ),
        ("NemotronConfig", {}, "attention was reached by none"),
        (
            "Lfm2Config",
            {"layer_types": ["conv", "full_attention"]},
            "has 2 layers, but attention was reached by layers 1",
        ),
        (
            "GptOssConfig",
            {"head_dim": 16, "num_local_experts": 4},
            r"passes s_aux= to its attention \(attention sinks\)",
        ),
        ("Gemma2Config", {"head_dim": 16}, r"passes softcap= .* \(capped attention scores\)"),
        (
            "DeepseekV3Config",
            {
                "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16,
                "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "first_k_dense_replace": 2,
            },
            "has keys of 24 and values of 16 numbers per head",
        ),
    ],
)  # fmt: skip
def test_the_probe_finds_what_the_config_does_not_say(
    kind: str, changes: dict[str, Any], message: str, config_of: ConfigOf
) -> None:
    model = build(config_of, kind, **changes)
    with pytest.raises(
        UnsupportedModelError, match=rf"^the model \({type(model).__name__}\).*{message}"
    ):
        probe("the model", model)


def test_the_probe_reads_the_size_of_the_cache_from_the_attention(config_of: ConfigOf) -> None:
    model = build(config_of, "GPTBigCodeConfig")
    layout = probe("the model", model)
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (2, 1, 16)
    assert model.config._attn_implementation == "eager"


def test_the_probe_finds_a_layer_that_mixes_tokens_beside_attention(config_of: ConfigOf) -> None:
    model = build(config_of, "LlamaConfig")

    def shift(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output + output.roll(1, dims=1)

    model.model.layers[0].mlp.register_forward_hook(shift)
    with pytest.raises(UnsupportedModelError, match="more than itself, its position and attention"):
        probe("the model", model)


def test_the_probe_finds_positions_that_are_not_the_ones_it_gave(config_of: ConfigOf) -> None:
    model = build(config_of, "LlamaConfig")

    def count_alone(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["position_ids"].shape[1]
        return args, kwargs | {"position_ids": torch.arange(length).unsqueeze(0)}

    model.model.rotary_emb.register_forward_pre_hook(count_alone, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="positions of its own"):
        probe("the model", model)


def test_weights_that_give_no_numbers_are_not_the_architectures_fault(config_of: ConfigOf) -> None:
    model = build(config_of, "LlamaConfig")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    assert probe("the model", model).num_layers == 2


def test_a_class_that_computes_every_logit_is_refused() -> None:
    class Whole(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None) -> Any:
            return super().forward(input_ids)

    assert "no logits_to_keep" in (_not_reachable(Whole) or "")
    assert _not_reachable(transformers.LlamaForCausalLM) is None
