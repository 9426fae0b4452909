"""Trains the demo model: `python -m quantgate.demo.train --out DIR --minutes 90 --export-to DIR`.

The learning rate is warm-up, stable, decay (WSD): the decay is the last part of the budget, so a
run can be shortened or extended while it is in its stable phase by resuming with another budget.
"""

import argparse
import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantgate.demo.batches import Batch, Group, Stream
from quantgate.demo.evaluate import score_samples
from quantgate.demo.export import export_model
from quantgate.demo.language import TASKS, sample
from quantgate.demo.tokenizer import VOCABULARY, train_tokenizer

logger = logging.getLogger(__name__)

GROUPS: tuple[Group, ...] = ("desk", "lookup", "prose")
# One group per step: many small steps learn to copy sooner than fewer large ones. Prose is easy.
SCHEDULE: tuple[Group, ...] = ("desk", "lookup", "desk") * 3 + ("prose",)
DECAY_SHARE = 0.18


@dataclass(frozen=True)
class Settings:
    """One training run. The budget is `minutes` of training or `steps`, whichever ends first."""

    out: Path
    export_to: Path | None = None
    # Exported weights and tokenizer to go on from, with a fresh optimizer; None starts at random.
    start_from: Path | None = None
    device: str = "cpu"
    minutes: float = 90.0
    steps: int = 1_000_000
    # Leave here with a checkpoint, the budget unfinished: an interruption that can be planned.
    stop_at: int = 1_000_000
    layers: int = 4
    intermediate: int = 1024
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    tokens_per_batch: int = 3072
    seed: int = 17
    bf16: bool = False
    compile: bool = False
    evaluate_every: int = 500
    evaluate_samples: int = 64
    checkpoint_every: int = 500
    tokenizer_samples: int = 3000


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


def model_config(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Widths are multiples of 128, so that group-128 quantization kernels apply everywhere."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


@torch.no_grad()
def share_word_forms(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> int:
    """Let `lamps` start as ` lamps` plus one offset common to all words.

    The message has a word after a space, the JSON answer has it after a quote, and these are two
    tokens. With unrelated embeddings, copying one as the other has to be learned word by word.

    Returns:
        How many words have both forms in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    pairs = [
        (token, vocabulary["Ġ" + text])
        for text, token in vocabulary.items()
        if len(text) > 2 and text.isalpha() and "Ġ" + text in vocabulary
    ]
    embedding = model.get_input_embeddings().weight
    bare, spaced = (torch.tensor(ids, device=embedding.device) for ids in zip(*pairs, strict=True))
    offset = (embedding[bare] - embedding[spaced]).mean(dim=0)
    embedding[bare] = embedding[spaced] + offset
    return len(pairs)


def learning_rate_factor(progress: Progress, settings: Settings) -> float:
    """Warm-up, stable, then linear decay to 2 % over the last `DECAY_SHARE` of the budget."""
    warm = min(1.0, (progress.step + 1) / settings.warmup_steps)
    done = max(progress.seconds / (60 * settings.minutes), progress.step / settings.steps)
    return warm * max(0.02, min(1.0, (1.0 - done) / DECAY_SHARE))


def train(settings: Settings, *, resume: bool) -> Progress:
    """Train until the budget is spent; write checkpoints, the log and exports on the way."""
    settings.out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(settings)
    model = _start_model(settings, tokenizer)
    optimizer = _optimizer(model, settings)
    streams = {
        group: Stream(tokenizer, group, tokens_per_batch=settings.tokens_per_batch)
        for group in GROUPS
    }
    progress = Progress()
    checkpoint = settings.out / "checkpoint.pt"
    if resume and checkpoint.exists():
        progress = _restore(checkpoint, model, optimizer, streams)
        logger.info("resumed at step %d, %d tokens", progress.step, progress.tokens)
    trunk: Callable[..., Any] = model.model
    if settings.compile:
        # Nine batch shapes: each is compiled once, and none may fall back to eager mode.
        torch._dynamo.config.recompile_limit = 64
        trunk = torch.compile(model.model, dynamic=False)

    loss: dict[Group, float] = {}
    last = min(settings.steps, settings.stop_at)
    stop = _StopRequest()
    while progress.step < last and progress.seconds < 60 * settings.minutes and not stop.asked:
        started = time.monotonic()
        factor = learning_rate_factor(progress, settings)
        for parameters in optimizer.param_groups:
            parameters["lr"] = settings.learning_rate * factor
        group = SCHEDULE[progress.step % len(SCHEDULE)]
        batch = streams[group].next_batch()
        value = _loss(model, trunk, batch, settings)
        torch.autograd.backward(value)
        seen = float(value.detach())
        loss[group] = 0.95 * loss.get(group, seen) + 0.05 * seen
        progress.tokens += batch.tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.seconds += time.monotonic() - started
        if progress.step % 50 == 0:
            _log_step(progress, loss, settings.learning_rate * factor)
        if progress.step % settings.evaluate_every == 0:
            _evaluate(model, tokenizer, progress, settings)
        if progress.step % settings.checkpoint_every == 0:
            _save(checkpoint, model, optimizer, streams, progress)
            _export(model, tokenizer, progress, settings)
    _evaluate(model, tokenizer, progress, settings)
    _save(checkpoint, model, optimizer, streams, progress)
    _export(model, tokenizer, progress, settings)
    return progress


def _start_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    if settings.start_from is not None:
        start = LlamaForCausalLM.from_pretrained(settings.start_from, local_files_only=True)
        return start.to(settings.device)
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(model_config(settings, tokenizer))
    share_word_forms(model, tokenizer)
    return model.to(settings.device)


class _StopRequest:
    """SIGTERM ends the run after its step, with a checkpoint to resume from."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _number: int, _frame: object) -> None:
        self.asked = True


def _tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    if settings.start_from is not None:
        return PreTrainedTokenizerFast.from_pretrained(settings.start_from, local_files_only=True)
    folder = settings.out / "tokenizer"
    if not folder.exists():
        train_tokenizer(settings.tokenizer_samples).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def _loss(
    model: LlamaForCausalLM, trunk: Callable[..., Any], batch: Batch, settings: Settings
) -> torch.Tensor:
    """Weighted mean loss; logits are made only where a weight asks for them."""
    ids, weights = batch.ids.to(settings.device), batch.weights.to(settings.device)
    casting = (
        torch.autocast(settings.device, torch.bfloat16)
        if settings.bf16
        else contextlib.nullcontext()
    )
    with casting:
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
        asked = weights[:, :-1] > 0
        logits = model.lm_head(hidden[:, :-1][asked]).float()
    nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:][asked], reduction="none")
    chosen = weights[:, :-1][asked]
    return (nll * chosen).sum() / chosen.sum()


def _log_step(progress: Progress, loss: dict[Group, float], rate: float) -> None:
    entry: dict[str, Any] = {
        "step": progress.step,
        "tokens": progress.tokens,
        "lr": round(rate, 6),
        "seconds": round(progress.seconds),
        **{f"loss_{group}": round(value, 4) for group, value in loss.items()},
    }
    progress.log.append(entry)
    speed = progress.tokens / max(progress.seconds, 1e-9)
    logger.info("%s  %.0f tok/s", json.dumps(entry), speed)


def _evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
    settings: Settings,
) -> None:
    entry: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
    for task in TASKS:
        held = [sample(task, "validation", index) for index in range(settings.evaluate_samples)]
        score = score_samples(model, tokenizer, held, device=settings.device, bf16=settings.bf16)
        value = score.nll if task == "prose" else score.accuracy
        entry["nll_prose" if task == "prose" else f"accuracy_{task}"] = round(value, 4)
    progress.log.append(entry)
    logger.info("EVAL %s", json.dumps(entry))


def _export(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
    settings: Settings,
) -> None:
    if settings.export_to is not None:
        export_model(model, tokenizer, settings.export_to, log=progress.log)


def _save(
    path: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    streams: dict[Group, Stream],
    progress: Progress,
) -> None:
    draft = path.with_suffix(".draft")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "streams": {group: stream.state() for group, stream in streams.items()},
        "progress": vars(progress),
    }
    torch.save(state, draft)
    draft.replace(path)


def _restore(
    path: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    streams: dict[Group, Stream],
) -> Progress:
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for group, stream in streams.items():
        if group in state["streams"]:
            stream.restore(state["streams"][group])
    return Progress(**state["progress"])


def main() -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(prog="python -m quantgate.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, tokenizer, log")
    parser.add_argument("--export-to", type=Path, help="model folder to refresh while training")
    parser.add_argument("--start-from", type=Path, help="model folder to go on training from")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=90.0, help="training time in total")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the default")
    parser.add_argument("--bf16", action="store_true", help="BF16 autocast: faster where native")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a compiler)")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = replace(
        Settings(out=arguments.out),
        export_to=arguments.export_to,
        start_from=arguments.start_from,
        device=device,
        minutes=arguments.minutes,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        bf16=arguments.bf16,
        compile=arguments.compile,
    )
    train(settings, resume=arguments.resume)


if __name__ == "__main__":
    main()
