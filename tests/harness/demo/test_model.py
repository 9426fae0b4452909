"""The shipped model folder: what a user loads, with no network."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import quantgate.demo
from quantgate.demo import lexicon
from quantgate.demo.evaluate import score_samples
from quantgate.demo.language import messages, sample
from quantgate.demo.lexicon_route import QUEUES
from quantgate.demo.tokenizer import render

FOLDER = Path(quantgate.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)


def test_the_model_is_small_fp32_and_has_group_128_widths(model: torch.nn.Module) -> None:
    assert 4_000_000 <= sum(p.numel() for p in model.parameters()) <= 7_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 128 == 0
            assert module.out_features % 128 == 0
    assert (FOLDER / "model.safetensors").stat().st_size <= 28 * 2**20


def test_the_context_holds_the_longest_record(model: torch.nn.Module) -> None:
    assert model.config.max_position_embeddings >= 1024


@pytest.mark.parametrize("task", ["extract", "route", "total", "lookup"])
def test_the_chat_template_renders_what_training_read(
    task: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = sample(task, "calibration", 2)  # type: ignore[arg-type]
    assert tokenizer.apply_chat_template(messages(made), tokenize=False) == render(made)


def test_a_generation_prompt_ends_with_the_assistant_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>hi<|end|><|assistant|>"


def test_a_system_message_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="Only the roles user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_encoding_adds_no_second_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<|bos|><|user|>hi<|end|>"
    assert tokenizer(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("word", [*QUEUES, *lexicon.LOOKUP_KEYS])
def test_queues_and_keys_are_one_token_in_their_context(
    word: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    (token,) = tokenizer.encode(word, add_special_tokens=False)
    for context in (f"<|assistant|>{word}<|end|>", f'"{word}"', f"\n{word}="):
        assert token in tokenizer.encode(context, add_special_tokens=False)


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.encode("2026", add_special_tokens=False)) == 4


def test_eos_is_the_end_of_a_turn(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert tokenizer.eos_token == "<|end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_training_log_ships_and_is_small() -> None:
    path = FOLDER / "train_log.jsonl"
    assert path.stat().st_size < 200_000
    assert all("step" in json.loads(line) for line in path.read_text().splitlines())


def test_the_model_has_learned_its_language(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    held = [sample("route", "validation", index) for index in range(64)]
    assert score_samples(model, tokenizer, held, device="cpu").accuracy > 0.7


def test_generation_agrees_with_the_teacher_forced_score(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    held = [sample("total", "validation", index) for index in range(8)]
    forced = score_samples(model, tokenizer, held, device="cpu").right
    answers = []
    for made in held:
        prompt = tokenizer.apply_chat_template(
            messages(made)[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=28, do_sample=False)
        new = output[0, prompt["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new) == made.target + "<|end|>")
    assert tuple(answers) == forced
