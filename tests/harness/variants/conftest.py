"""Tiny source models on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture(scope="session")
def save_llama() -> Callable[..., Path]:
    """Writes a random FP32 Llama of one layer with a tokenizer of one token per byte."""

    def save(folder: Path, *, shard_size: str = "1GB", **changes: Any) -> Path:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        values: dict[str, Any] = {
            "vocab_size": len(letters),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(values | changes)))
        model.save_pretrained(folder, max_shard_size=shard_size)
        raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
        fast.chat_template = "{{ messages[0].content }}"
        fast.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def model_folder(tmp_path: Path, save_llama: Callable[..., Path]) -> Path:
    """A model that the test may damage."""
    return save_llama(tmp_path / "tiny")
