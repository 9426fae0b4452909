"""The training stream: samples rendered, weighted, and packed into batches of few fixed shapes.

Fixed shapes keep a compiled model from recompiling; a group per step keeps every task in each
optimizer step. The stream's state is two counters and the samples waiting for a full batch, so
that training resumes exactly where it stopped.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from quantgate.demo.language import Sample, Task, messages, sample
from quantgate.demo.tokenizer import BOS, END

Group = Literal["desk", "lookup", "prose"]

CYCLE: dict[Group, tuple[Task, ...]] = {
    "desk": ("extract", "total", "extract", "total", "route"),
    "lookup": ("lookup",),
    "prose": ("prose",),
}
WIDTHS: dict[Group, tuple[int, ...]] = {
    "desk": (48, 72, 104),
    "lookup": (160, 288, 448, 672, 928),
    "prose": (328,),
}
# Questions are read, not written: their tokens teach the language a little, answers the task.
PROMPT_WEIGHT: dict[Task, float] = {
    "extract": 0.05,
    "route": 0.05,
    "total": 0.05,
    "lookup": 0.0,
    "prose": 1.0,
}
# A route answer is one word beside dozens of tokens of JSON: without this it is hardly heard.
ANSWER_WEIGHT: dict[Task, float] = {
    "extract": 1.0,
    "route": 8.0,
    "total": 1.0,
    "lookup": 1.0,
    "prose": 1.0,
}


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each token the weight of predicting it."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Batch:
    """One forward pass: right-padded ids [B, T] and the loss weights of each next token [B, T]."""

    ids: torch.Tensor
    weights: torch.Tensor
    tokens: int


def encode(tokenizer: PreTrainedTokenizerFast, made: Sample) -> Encoded:
    """Tokenize a sample and weight its answers (the closing `<|end|>` included)."""
    weight = PROMPT_WEIGHT[made.task]
    if made.task == "prose":
        ids = tokenizer.encode(f"{BOS}{made.prompt}{END}", add_special_tokens=False)
        return Encoded(ids, [0.0] + [weight] * (len(ids) - 1))
    ids, weights = tokenizer.encode(BOS, add_special_tokens=False), [0.0]
    for message in messages(made):
        head = tokenizer.encode(f"<|{message['role']}|>", add_special_tokens=False)
        body = tokenizer.encode(message["content"] + END, add_special_tokens=False)
        ids += head + body
        answer = message["role"] == "assistant"
        weights += [0.0] + [ANSWER_WEIGHT[made.task] if answer else weight] * len(body)
    return Encoded(ids, weights)


def collate(rows: list[Encoded], *, width: int, pad: int) -> Batch:
    """Right-pad to `width`; causal attention never looks at padding, so no mask is needed."""
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        weights[place, : len(row.ids) - 1] = torch.tensor(row.weights[1:])
    return Batch(ids, weights, sum(len(row.ids) for row in rows))


class Stream:
    """Endless batches of one group, each about `tokens_per_batch` tokens with padding."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, group: Group, *, tokens_per_batch: int
    ) -> None:
        self._tokenizer = tokenizer
        self._group = group
        self._tokens_per_batch = tokens_per_batch
        self._next = 0
        self._waiting: dict[int, list[tuple[Task, int]]] = {w: [] for w in WIDTHS[group]}
        self._encoded: dict[tuple[Task, int], Encoded] = {}

    def next_batch(self) -> Batch:
        cycle = CYCLE[self._group]
        while True:
            task, index = cycle[self._next % len(cycle)], self._next
            self._next += 1
            width = self._place(task, index)
            if width is None:
                continue
            waiting = self._waiting[width]
            if len(waiting) >= max(1, self._tokens_per_batch // width):
                rows = [self._encode(*key) for key in waiting]
                for key in waiting:
                    self._encoded.pop(key, None)
                waiting.clear()
                return collate(rows, width=width, pad=int(self._tokenizer.pad_token_id))

    def state(self) -> dict[str, Any]:
        waiting = {width: list(rows) for width, rows in self._waiting.items()}
        return {"next": self._next, "waiting": waiting}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"]
        for rows in state["waiting"].values():
            for task, index in rows:
                self._place(task, index)

    def _place(self, task: Task, index: int) -> int | None:
        """Put a sample in line for the narrowest width it fits; None if it fits none."""
        needed = len(self._encode(task, index).ids)
        width = next((w for w in WIDTHS[self._group] if needed <= w), None)
        if width is not None:
            self._waiting[width].append((task, index))
        return width

    def _encode(self, task: Task, index: int) -> Encoded:
        key = (task, index)
        if key not in self._encoded:
            self._encoded[key] = encode(self._tokenizer, sample(task, "train", index))
        return self._encoded[key]
