"""The trainer resumes exactly, and its batches weigh what they should."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from quantgate.demo.batches import Stream, collate, encode
from quantgate.demo.language import TASKS, sample
from quantgate.demo.tokenizer import render, train_tokenizer
from quantgate.demo.train import Progress, Settings, learning_rate_factor, train

TINY = Settings(
    out=Path("unset"),
    steps=3,
    layers=2,
    intermediate=128,
    tokens_per_batch=128,
    evaluate_every=100,
    evaluate_samples=2,
    checkpoint_every=2,
    tokenizer_samples=200,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(200)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, parts = (replace(TINY, out=tmp_path / name) for name in ("whole", "parts"))
    train(whole, resume=False)
    train(replace(parts, stop_at=2), resume=False)
    train(parts, resume=True)
    ends = [torch.load(run.out / "checkpoint.pt", weights_only=True) for run in (whole, parts)]
    assert ends[0]["streams"] == ends[1]["streams"]
    assert ends[0]["progress"]["tokens"] == ends[1]["progress"]["tokens"]
    # Sums on a CPU depend on where memory is aligned; a lost step moves weights by 1e-5 and more.
    torch.testing.assert_close(ends[0]["model"], ends[1]["model"], rtol=0, atol=1e-6)


def test_a_run_without_resume_starts_over(tmp_path: Path) -> None:
    settings = replace(TINY, out=tmp_path, steps=1)
    assert train(settings, resume=False).step == 1
    assert train(settings, resume=False).step == 1
    assert train(settings, resume=True).step == 1


def test_an_export_loads_as_a_model_with_tokenizer_and_log(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    train(replace(TINY, out=tmp_path, export_to=folder, steps=1), resume=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert (folder / "tokenizer.json").exists()
    assert (folder / "train_log.jsonl").read_text().count("\n") >= 1
    assert not list(tmp_path.glob(".export-*"))


def test_a_run_can_start_from_exported_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    train(replace(TINY, out=tmp_path / "first", export_to=folder, steps=1), resume=False)
    second = replace(TINY, out=tmp_path / "second", start_from=folder, steps=0)
    assert train(second, resume=False).step == 0
    ended = torch.load(tmp_path / "second" / "checkpoint.pt", weights_only=True)["model"]
    exported = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in exported.items():
        assert torch.equal(ended[name], weight), name


@pytest.mark.parametrize(
    ("step", "seconds", "factor"),
    [(0, 0.0, 0.005), (199, 0.0, 1.0), (500, 0.0, 1.0), (500, 546.0, 0.5), (500, 600.0, 0.02)],
)
def test_the_learning_rate_warms_up_stays_and_decays(
    step: int, seconds: float, factor: float
) -> None:
    settings = Settings(out=Path("unset"), minutes=10.0)
    progress = Progress(step=step, seconds=seconds)
    assert learning_rate_factor(progress, settings) == pytest.approx(factor, abs=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_encoding_a_sample_gives_the_rendered_text(
    task: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = sample(task, "train", 5)  # type: ignore[arg-type]
    encoded = encode(tokenizer, made)
    assert tokenizer.decode(encoded.ids) == render(made)
    assert len(encoded.ids) == len(encoded.weights)


def test_only_the_answer_and_its_end_weigh_one_or_more(tokenizer: PreTrainedTokenizerFast) -> None:
    made = sample("total", "train", 1)
    row = encode(tokenizer, made)
    batch = collate([row], width=len(row.ids) + 3, pad=0)
    full = batch.weights[0] >= 1.0
    # weights[t] is the weight of predicting token t + 1.
    assert tokenizer.decode(batch.ids[0][1:][full[:-1]]) == made.target + "<|end|>"
    assert batch.weights[0, len(row.ids) - 1 :].sum() == 0


def test_a_restored_stream_continues_with_the_same_batch(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    first = Stream(tokenizer, "desk", tokens_per_batch=512)
    for _ in range(3):
        first.next_batch()
    second = Stream(tokenizer, "desk", tokens_per_batch=512)
    second.restore(first.state())
    assert torch.equal(first.next_batch().ids, second.next_batch().ids)
