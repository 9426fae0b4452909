"""What a step must at least move and compute, and how near a step came to what the device can do.

Pure arithmetic on a model's shape; `model_cost.py` reads the shape, `ceilings.py` the device.
Activations and sampling are left out, and a cache may hold the weights: bytes are those that must
cross to the arithmetic units once per step, so a small model on a CPU can exceed memory bandwidth.

Symbols: T tokens of the step, R rows of logits, a chunk has s tokens behind it and n of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The numbers of one loaded model that its steps' costs follow from.

    Args:
        step_bytes: stored bytes read whole by every step: weights as the scheme stores them with
            their scales, norms, and the output head; not the embedding table, unless it is the
            head.
        row_bytes: the embedding table's row, gathered once per token.
        layer_weights: weights of all layers' Linears: multiply-adds per token.
        head_weights: weights of the output head: multiply-adds per row of logits.
        kv_bytes: keys and values of one token in all layers.
        attention_width: layers x query heads x head dim.
    """

    step_bytes: int
    row_bytes: int
    layer_weights: int
    head_weights: int
    kv_bytes: int
    attention_width: int


class StepWork(NamedTuple):
    """Bytes moved and floating-point operations."""

    num_bytes: int
    num_flops: int


class Ceilings(NamedTuple):
    """What the device reached on a copy and on a matrix product."""

    bytes_per_s: float
    flops_per_s: float


def step_work(cost: ModelCost, chunks: Iterable[tuple[int, int]], *, num_rows: int) -> StepWork:
    """The least work of a step over `chunks` of (tokens behind, own tokens) reading `num_rows`.

    bytes = step_bytes + T row_bytes + sum(s + n) kv_bytes + T kv_bytes
        (weights once; embeddings; keys and values read once per chunk and written once per token)
    flops = 2 T layer_weights + 2 R head_weights + 4 attention_width sum(n s + n (n + 1) / 2)
        (a multiply-add is 2; each query meets the tokens up to itself, for QK^T and for PV)
    """
    tokens = context = pairs = 0
    for behind, own in chunks:
        tokens += own
        context += behind + own
        pairs += own * behind + own * (own + 1) // 2
    return StepWork(
        cost.step_bytes + tokens * cost.row_bytes + (context + tokens) * cost.kv_bytes,
        2 * (tokens * cost.layer_weights + num_rows * cost.head_weights)
        + 4 * cost.attention_width * pairs,
    )


def decode_tokens_per_s(cost: ModelCost, ceilings: Ceilings, *, batch: int, context: int) -> float:
    """The most tokens per second that `batch` sequences of `context` tokens can be given."""
    work = step_work(cost, [(context - 1, 1)] * batch, num_rows=batch)
    return batch / max(work.num_bytes / ceilings.bytes_per_s, work.num_flops / ceilings.flops_per_s)
