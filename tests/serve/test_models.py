"""Every family that is served gives, batched and ragged, the tokens of generate() in FP32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantgate_serve.config import ServerSettings
from quantgate_serve.engine import Engine
from quantgate_serve.request import Request
from quantgate_serve.startup import build_engine, load_for_serving

RunAll = Callable[[Engine, list[Request]], None]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_one_key_head": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama_scaled_rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama_dynamic_rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "ministral3": ("Ministral3Config", {}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "layer_types": ["full_attention"] * 2}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "gpt2": ("GPT2Config", {}),
    "gpt_bigcode": ("GPTBigCodeConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"layer_types": ["full_attention"] * 2}),
    "granite": ("GraniteConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "cohere": ("CohereConfig", {}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "exaone4": ("Exaone4Config", {"sliding_window": 256}),
    "ernie4_5": ("Ernie4_5Config", {}),
    "helium": ("HeliumConfig", {"head_dim": 16}),
    "persimmon": ("PersimmonConfig", {}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite_moe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
# Models whose window is served up to its width, where it changes nothing.
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"sliding_window": 64}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 64}),
    "phi3": ("Phi3Config", {"sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 64, "head_dim": 16}),
    "cohere2": ("Cohere2Config", {"sliding_window": 64}),
    "phi3_longrope": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 64,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate_in_every_family(
    family: str,
    save_model: Callable[..., Path],
    config_of: Callable[..., Any],
    make_engine: Callable[..., Engine],
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: RunAll,
    generate: Callable[..., list[int]],
) -> None:
    kind, changes = FAMILIES[family]
    folder = save_model(config_of(getattr(transformers, kind), **changes), dtype=torch.bfloat16)
    requests = [make_request(prompt) for prompt in prompts(8)]
    run_all(make_engine(folder), requests)
    for request in requests:
        assert request.output_ids == generate(folder, request.prompt_ids)
    # A model that says the same whatever it is asked would prove nothing.
    assert len({token for request in requests for token in request.output_ids}) > 8


@pytest.mark.parametrize("family", WINDOWED)
def test_within_its_window_a_model_is_served_to_the_last_token(
    family: str,
    save_model: Callable[..., Path],
    config_of: Callable[..., Any],
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: RunAll,
) -> None:
    kind, changes = WINDOWED[family]
    folder = save_model(config_of(getattr(transformers, kind), **changes))
    settings = ServerSettings(
        model=folder, device="cpu", max_context=64, kv_tokens=4096, max_batched_tokens=64
    )
    engine = build_engine(load_for_serving(folder, settings), settings)
    requests = [make_request(prompt, max_tokens=64 - len(prompt)) for prompt in prompts(8)]
    run_all(engine, requests)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for request in requests:
        assert len(request.token_ids) == 64
        expected = reference.generate(
            torch.tensor([request.prompt_ids]),
            attention_mask=torch.ones(1, request.num_prompt, dtype=torch.int64),
            max_new_tokens=64 - request.num_prompt,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert request.token_ids == expected[0].tolist()
