"""Exact-match accuracy of the demo model on its own language, by teacher forcing.

Greedy decoding writes the target exactly if and only if every target token is the argmax after
the true prefix, so one forward pass per batch replaces generation.
"""

import contextlib
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quantgate.demo.batches import collate, encode
from quantgate.demo.language import TASKS, Sample, Split, Task, sample


@dataclass(frozen=True)
class TaskScore:
    """`accuracy` is exact match; for prose there is none and `nll` (nats per token) speaks."""

    task: Task
    n: int
    accuracy: float
    nll: float
    right: tuple[bool, ...]


def score_split(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    split: Split,
    per_task: int,
    device: str,
) -> dict[Task, TaskScore]:
    """Score the first `per_task` samples of every task of a split."""
    return {
        task: score_samples(
            model, tokenizer, [sample(task, split, i) for i in range(per_task)], device=device
        )
        for task in TASKS
    }


@torch.no_grad()
def score_samples(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    samples: list[Sample],
    *,
    device: str,
    rows: int = 16,
    bf16: bool = False,
) -> TaskScore:
    """Score samples of one task, in batches of similar length."""
    encoded = [encode(tokenizer, made) for made in samples]
    order = sorted(range(len(samples)), key=lambda place: len(encoded[place].ids))
    right = [False] * len(samples)
    loss = weight = 0.0
    casting = torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()
    for start in range(0, len(order), rows):
        places = order[start : start + rows]
        width = max(len(encoded[place].ids) for place in places)
        batch = collate(
            [encoded[place] for place in places], width=width, pad=int(tokenizer.pad_token_id)
        )
        ids, answers = batch.ids.to(device), (batch.weights >= 1.0).to(device)
        with casting:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        targets, judged = ids[:, 1:], answers[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        loss += float((nll * judged).sum())
        weight += float(judged.sum())
        hits = ((logits.argmax(-1) == targets) | ~judged).all(dim=1)
        for place, hit in zip(places, hits.tolist(), strict=True):
            right[place] = hit
    accuracy = sum(right) / len(right)
    return TaskScore(samples[0].task, len(samples), accuracy, loss / weight, tuple(right))
