"""The model and the requests of the serving benchmark: random, seeded, made here.

A 20 M-parameter Llama shape in FP32, and two workloads with fixed output lengths: A is heavy on
prompts, B on ragged outputs.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB_SIZE = 4096
CONTEXT_LENGTH = 512


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A prompt, and how many tokens are wanted after it."""

    prompt: list[int]
    num_output: int


def write_model(folder: Path) -> None:
    """Write the benchmark's Llama: 20.1 M parameters, hidden 512, 6 layers, 8 heads on 4."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1216,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
    )
    _write(folder, config, VOCAB_SIZE)


def write_tiny_model(folder: Path) -> None:
    """Write a model whose steps cost next to nothing, to run through many requests."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    _write(folder, config, 256)


def workload_a(count: int) -> list[BenchRequest]:
    """Prompts U(20, 200), outputs U(8, 64)."""
    source = np.random.default_rng(1)
    return [
        BenchRequest(_prompt(source, 20, 200), int(source.integers(8, 65))) for _ in range(count)
    ]


def workload_b(count: int) -> list[BenchRequest]:
    """Prompts U(8, 32), outputs exponential with mean 64, clipped to [8, 256]."""
    source = np.random.default_rng(2)
    return [
        BenchRequest(_prompt(source, 8, 32), int(np.clip(round(source.exponential(64.0)), 8, 256)))
        for _ in range(count)
    ]


def num_output(requests: list[BenchRequest]) -> int:
    """The useful tokens of a workload: those that were asked for."""
    return sum(request.num_output for request in requests)


def _prompt(source: np.random.Generator, shortest: int, longest: int) -> list[int]:
    length = int(source.integers(shortest, longest + 1))
    ids: list[int] = source.integers(2, VOCAB_SIZE, length).tolist()
    return ids


def _write(folder: Path, config: transformers.LlamaConfig, vocab_size: int) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(vocab_size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
