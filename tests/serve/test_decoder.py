"""The short way through Llama-like models gives the logits of their own forward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantgate_serve import offline
from quantgate_serve.attention.interface import AttentionStep, PrefillSpan
from quantgate_serve.attention.torch_paged import attend
from quantgate_serve.decoder import ShortDecoder, WholeDecoder, build_decoder
from quantgate_serve.kv.pool import PAGE_SIZE
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.linear import PackedLinear

SHORT = {
    "llama": (transformers.LlamaConfig, {}),
    "biased_llama": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "scaled_llama": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "tied_llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}),
}


@pytest.mark.parametrize("family", SHORT)
def test_the_short_way_gives_the_model_s_own_logits(
    family: str, save_model: Callable[..., Path], config_of: Callable[..., Any]
) -> None:
    kind, changes = SHORT[family]
    loaded = offline.load_model(save_model(config_of(kind, **changes)), device="cpu")
    ids = list(range(5, 25))
    expected = offline.logits(loaded, ids)
    decoder = build_decoder(loaded.model, attend)
    assert isinstance(decoder, ShortDecoder)
    kv = KVStorage(loaded.kv_shape, num_pages=2, page_size=PAGE_SIZE, device=torch.device("cpu"))
    slots = torch.arange(len(ids))
    heads = torch.arange(loaded.kv_shape.num_kv_heads)
    page_rows = (slots // PAGE_SIZE * len(heads)).unsqueeze(1) + heads
    step = AttentionStep(
        kv,
        (page_rows * PAGE_SIZE + (slots % PAGE_SIZE).unsqueeze(1)).reshape(-1),
        (),
        (PrefillSpan(0, len(ids), None, None),),
    )
    with torch.inference_mode():
        found = decoder(torch.tensor(ids), slots, step, torch.tensor([3, 19]))
    assert torch.allclose(found, expected[[3, 19]], atol=1e-4)


def test_other_models_go_through_their_own_forward_with_packed_linears(
    save_model: Callable[..., Path], config_of: Callable[..., Any]
) -> None:
    folder = save_model(config_of(transformers.GPTNeoXConfig, num_key_value_heads=4))
    decoder = build_decoder(offline.load_model(folder, device="cpu").model, attend)
    assert isinstance(decoder, WholeDecoder)
    assert any(isinstance(module, PackedLinear) for module in decoder.modules())
    assert not any(type(module) is torch.nn.Linear for module in decoder.modules())


def test_packing_does_not_keep_the_weights_twice(
    save_model: Callable[..., Path], config_of: Callable[..., Any]
) -> None:
    loaded = offline.load_model(save_model(config_of(transformers.LlamaConfig)), device="cpu")
    before = loaded.weight_bytes
    decoder = build_decoder(loaded.model, attend)
    held = sum(t.numel() * t.element_size() for t in [*decoder.parameters(), *decoder.buffers()])
    assert held == before
