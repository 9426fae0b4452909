"""What is loaded, and what is refused with which reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantgate_serve import offline
from quantgate_serve.engine import Engine
from quantgate_serve.loading import UnsupportedModelError, choose_device
from quantgate_serve.request import Request

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture
def copy_of(llama_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model with changes to its config.json."""

    def copy(**changes: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(llama_folder, folder)
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return copy


def quantized(folder: Path, target: Path, **options: Any) -> Path:
    """Saves `folder` quantized by bitsandbytes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(**options),
    )
    model.save_pretrained(target)
    for path in folder.glob("*token*"):
        shutil.copy(path, target)
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5", "architectures": ["T5Model"]}, "encoder-decoder model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal"),
        ({"model_type": "nonesuch"}, "does not know model_type 'nonesuch'"),
        (
            {"model_type": "nonesuch", "auto_map": {"AutoConfig": "x.Y"}},
            "needs trust_remote_code",
        ),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding-window attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization method 'awq'"),
    ],
)
def test_an_unsupported_model_is_refused_with_its_reason(
    changes: dict[str, Any], message: str, copy_of: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        offline.load_model(copy_of(**changes), device="cpu")


def test_a_window_as_wide_as_the_context_is_no_window(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=256)
    assert offline.load_model(folder, device="cpu").context_length == 256


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"config\.json is not JSON \(Expecting"), ("[]", "holds a list, expected an object")],
)
def test_a_config_that_is_no_json_object_is_refused(
    text: str, message: str, copy_of: Callable[..., Path]
) -> None:
    folder = copy_of()
    (folder / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=message):
        offline.load_model(folder, device="cpu")


def test_a_folder_without_a_tokenizer_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UnsupportedModelError, match="has no tokenizer"):
        offline.load_model(folder, device="cpu")


@pytest.mark.parametrize("device", ["banana", "cuda:x", "meta"])
def test_a_device_that_is_not_served_is_refused(device: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^--device {device}.*Use auto, cpu or cuda:N"):
        choose_device(device)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no config\.json"):
        offline.load_model(tmp_path, device="cpu")


def test_the_end_tokens_of_generation_config_are_honoured(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    assert offline.load_model(folder, device="cpu").eos_ids == {1, 5}


def test_bf16_weights_are_computed_in_fp32_on_the_cpu(llama_folder: Path) -> None:
    loaded = offline.load_model(llama_folder, device="cpu")
    assert loaded.dtype == torch.float32
    weight = next(loaded.model.parameters())
    assert torch.equal(weight, weight.bfloat16().float())


@pytest.fixture(scope="module")
def nf4_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(
        llama_folder,
        tmp_path_factory.mktemp("nf4"),
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
    )


def test_nf4_serves_the_tokens_of_generate(
    nf4_folder: Path,
    make_engine: Callable[..., Engine],
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
) -> None:
    requests = [make_request(prompt) for prompt in prompts(64)]
    run_all(make_engine(nf4_folder), requests)
    for request in requests:
        assert request.output_ids == generate(nf4_folder, request.prompt_ids)


def test_nf4_stays_in_fp32_where_the_cpu_has_bf16_arithmetic(nf4_folder: Path) -> None:
    loaded = offline.load_model(nf4_folder, device="cpu")
    assert loaded.quantization == "bitsandbytes-4bit"
    linear = loaded.model.model.layers[0].mlp.gate_proj
    torch.manual_seed(0)
    x = torch.randn(1, 4, 64)
    change = (linear(x * (1 + 1e-6)) - linear(x)).abs().max().item()
    # BF16 inputs would either not see a change of 1e-6 or jump by 2^-8.
    assert 0 < change < 1e-3


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_int8_alone_in_the_batch_serves_the_tokens_of_generate(
    threshold: float,
    llama_folder: Path,
    tmp_path: Path,
    make_engine: Callable[..., Engine],
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
) -> None:
    """LLM.int8 takes the outlier columns (beyond `threshold`) from the batch as a whole.

    So numbers depend on who shares a step, as they do in transformers itself: what holds
    is that a request alone equals generate(). Without outliers (`threshold` 0) every row is
    scaled for itself and the batch does not matter.
    """
    folder = quantized(
        llama_folder, tmp_path / "int8", load_in_8bit=True, llm_int8_threshold=threshold
    )
    requests = [make_request(prompt) for prompt in prompts(16)]
    batch = 1 if threshold else 16
    run_all(make_engine(folder, max_batch_size=batch, max_batched_tokens=512), requests)
    for request in requests:
        assert request.output_ids == generate(folder, request.prompt_ids)


def test_offline_logits_of_a_half_precision_model_are_not_rounded_to_it(
    llama_folder: Path,
) -> None:
    loaded = offline.load_model(llama_folder, device="cpu", dtype="bfloat16")
    ids = [5, 6, 7, 8]
    found = offline.logits(loaded, ids)
    with torch.inference_mode():
        hidden = loaded.model.base_model(torch.tensor([ids])).last_hidden_state[0]
        rounded = loaded.model(torch.tensor([ids])).logits[0]
    head = loaded.model.get_output_embeddings()
    assert torch.equal(found, hidden.float() @ head.weight.float().T)
    assert not torch.equal(found, found.bfloat16().float())
    # The head is as it was: the model's own forward still rounds.
    assert rounded.dtype == torch.bfloat16
