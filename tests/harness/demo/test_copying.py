"""The copying circuit works before any training, and refuses a layout it does not fit."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantgate.demo.copying import install_copying_circuit

FIRST_WORD = 261


def small_model(*, heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(17)
    config = LlamaConfig(
        vocab_size=1280,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def share_copied(model: LlamaForCausalLM) -> float:
    """How often the argmax is right on the second half of random runs said twice."""
    half = torch.randint(FIRST_WORD, 1280, (8, 30), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([half, half], dim=1)
    with torch.no_grad():
        guess = model(input_ids=ids).logits.argmax(-1)
    # The first token of the second half cannot be known to be a repetition.
    return float((guess[:, 30:-1] == ids[:, 31:]).float().mean())


def test_a_random_run_is_copied_before_any_training() -> None:
    model = small_model()
    assert share_copied(model) < 0.05
    install_copying_circuit(model, seed=17)
    assert share_copied(model) > 0.2


def test_another_head_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="laid out for 4 query heads"):
        install_copying_circuit(small_model(heads=2), seed=17)
