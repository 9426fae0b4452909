"""Tiny models with a tokenizer, made here, and engines over them."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; it must know before transformers imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quantgate_serve.config import ServerSettings
from quantgate_serve.engine import Engine
from quantgate_serve.loading import LoadedModel
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.startup import build_engine, load_for_serving

VOCAB_SIZE = 384
CONTEXT_LENGTH = 256
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LoadModel = Callable[[Path], LoadedModel]
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    words = ("boxes", "nuts", "bolts", "tea", "café", "naïve", "€", "order")
    texts = [f"the order desk takes {i} {word} today." for i in range(40) for word in words]
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """Writes a random model of `config` as a folder of safetensors, with the tokenizer."""

    def save(config: Any, *, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path_factory.mktemp(config.model_type)
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def small_config(kind: type, **changes: Any) -> Any:
    """A two-layer configuration. The wide initialisation keeps the best two logits apart."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    return kind(**(values | changes))


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Any]:
    return small_config


@pytest.fixture(scope="session")
def llama_folder(save_model: Callable[..., Path]) -> Path:
    """BF16 weights, as a variant stores them."""
    return save_model(small_config(transformers.LlamaConfig), dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def load_model() -> LoadModel:
    """Loads a folder for serving on the CPU, each folder once."""
    loaded: dict[Path, LoadedModel] = {}

    def load(folder: Path) -> LoadedModel:
        if folder not in loaded:
            settings = ServerSettings(model=folder, device="cpu")
            loaded[folder] = load_for_serving(folder, settings)
        return loaded[folder]

    return load


@pytest.fixture
def make_engine(load_model: LoadModel, llama_folder: Path) -> MakeEngine:
    """An engine that the test steps by hand."""

    def make(folder: Path | None = None, **changes: Any) -> Engine:
        values = {"kv_tokens": 4096, "max_batch_size": 16, "max_batched_tokens": 64} | changes
        chosen = folder or llama_folder
        settings = ServerSettings(model=chosen, device="cpu", **values)
        return build_engine(load_model(chosen), settings)

    return make


@pytest.fixture(scope="session")
def prompts() -> Callable[[int], list[list[int]]]:
    """Ragged prompts of token ids, the same for the same number."""

    def make(count: int) -> list[list[int]]:
        source = random.Random(count)
        return [
            [source.randrange(2, VOCAB_SIZE) for _ in range(source.randint(1, 60))]
            for _ in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """A greedy request for exactly `max_tokens` tokens, unless told otherwise."""

    def make(prompt: list[int], **params: Any) -> Request:
        return Request(prompt, SamplingParams(**({"max_tokens": 12, "ignore_eos": True} | params)))

    return make


@pytest.fixture(scope="session")
def run_all() -> Callable[[Engine, list[Request]], None]:
    """Submits requests and steps until all have ended, checking every page on the way."""

    def run(engine: Engine, requests: list[Request]) -> None:
        engine.submit(requests)
        while engine.has_work:
            engine.step()
            engine._scheduler.check_integrity()

    return run


@pytest.fixture(scope="session")
def generate() -> Callable[..., list[int]]:
    """What transformers' generate() gives for one prompt alone, greedily: the new tokens.

    Each is generated once: fewer tokens are the first of more.
    """
    references: dict[Path, Any] = {}
    known: dict[tuple[Path, tuple[int, ...]], list[int]] = {}

    def run(folder: Path, prompt: list[int], *, max_tokens: int = 12) -> list[int]:
        tokens = known.get((folder, tuple(prompt)), [])
        if len(tokens) < max_tokens:
            tokens = known[folder, tuple(prompt)] = compute(folder, prompt, max_tokens)
        return tokens[:max_tokens]

    def compute(folder: Path, prompt: list[int], max_tokens: int) -> list[int]:
        from quantgate_serve import offline

        if folder not in references:
            references[folder] = offline.load_model(folder, device="cpu").model
        output = references[folder].generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return list(output[0, len(prompt) :].tolist())

    return run
