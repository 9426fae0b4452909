"""What is read from real modules: every scheme's stored bytes, every shape's weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantgate_serve.kv.storage import KVShape
from quantgate_serve.loading import LoadedModel
from quantgate_serve.model_cost import read_cost

LoadModel = Callable[[Path], LoadedModel]
SHAPE = KVShape(num_layers=2, num_kv_heads=2, head_dim=16, dtype=torch.float32)
# hidden 64, intermediate 128, 4 heads and 2 KV heads of 16, two layers, vocabulary 384.
LAYERS = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
NORMS = (2 * 2 + 1) * 64


def cost_of(config: Any) -> Any:
    return read_cost(transformers.AutoModelForCausalLM.from_config(config), SHAPE)


def test_a_llama_costs_its_linears_head_and_norms_but_not_its_table(
    load_model: LoadModel, llama_folder: Path
) -> None:
    loaded = load_model(llama_folder)
    cost = read_cost(loaded.model, loaded.kv_shape)
    assert cost is not None
    assert cost.layer_weights == LAYERS
    assert cost.head_weights == 64 * 384
    # FP32 on the CPU; rotary frequencies are two buffers of 8.
    assert cost.step_bytes == 4 * (LAYERS + 64 * 384 + NORMS) + 2 * 4 * 8
    assert cost.row_bytes == 4 * 64
    assert cost.kv_bytes == 2 * 2 * 2 * 16 * 4
    assert cost.attention_width == 2 * 4 * 16


def test_a_table_that_is_the_head_is_read_whole(config_of: Callable[..., Any]) -> None:
    apart = cost_of(config_of(transformers.LlamaConfig))
    tied = cost_of(config_of(transformers.LlamaConfig, tie_word_embeddings=True))
    assert tied == apart


def test_gpt_neox_counts_its_fused_projections(config_of: Callable[..., Any]) -> None:
    cost = cost_of(config_of(transformers.GPTNeoXConfig))
    assert cost.layer_weights == 2 * (64 * 192 + 64 * 64 + 2 * 64 * 128)


def test_8_bit_weights_cost_a_byte_and_their_scales(config_of: Callable[..., Any]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = transformers.AutoModelForCausalLM.from_config(config_of(transformers.LlamaConfig))
    plain = read_cost(model, SHAPE)
    old = model.model.layers[0].mlp.up_proj
    new = bitsandbytes.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    new.weight = bitsandbytes.nn.Int8Params(
        old.weight.data, requires_grad=False, has_fp16_weights=False
    ).to("cpu")
    model.model.layers[0].mlp.up_proj = new
    cost = read_cost(model, SHAPE)
    assert plain is not None
    assert cost is not None
    assert plain.step_bytes - cost.step_bytes == 3 * 64 * 128 - 4 * 128
    assert cost.layer_weights == plain.layer_weights


def test_a_mixture_of_experts_has_no_cost_rather_than_a_wrong_one(
    config_of: Callable[..., Any],
) -> None:
    config = config_of(transformers.MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
    assert cost_of(config) is None
