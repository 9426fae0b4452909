"""Teacher-forced scoring without a server: the weights exactly as the server loads them.

The public door for the harness; plain transformers forward, no paging, no batching tricks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantgate_serve import loading
from quantgate_serve.loading import LoadedModel, UnsupportedModelError

__all__ = ["LoadedModel", "UnsupportedModelError", "load_model", "log_probs", "logits"]


def load_model(
    folder: Path, *, device: str = "auto", dtype: str = "auto", max_context: int | None = None
) -> LoadedModel:
    """Load `folder` as the server would, with transformers' own attention.

    Raises:
        UnsupportedModelError: the server would refuse it too; the message says why.
    """
    return loading.load(
        Path(folder), device=device, dtype=dtype, attention="sdpa", max_context=max_context
    )


def logits(loaded: LoadedModel, token_ids: Sequence[int]) -> Tensor:
    """FP32 logits [T, V] on the CPU; row i predicts token i + 1.

    They are never rounded to the model's own precision. Near 20 two BF16 numbers are 0.125 apart:
    of 2,000 simulated positions of 32,000 logits, rounding one side alone is a KL of 0.0003 nats
    and both sides, a little shifted, 0.0008, where a cast of the weights is allowed 0.001.
    """
    return _forward(loaded, [token_ids])[0]


def log_probs(loaded: LoadedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each sequence its FP32 log-probabilities [T, V]; the batch is padded on the right.

    Padding cannot reach earlier tokens through causal attention. Quantized Linears that look at the
    whole batch (LLM.int8 outlier columns) do see it: score one at a time where that matters.
    """
    return [torch.log_softmax(rows, dim=-1) for rows in _forward(loaded, sequences)]


@torch.inference_mode()
def _forward(loaded: LoadedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    lengths = [len(ids) for ids in sequences]
    ids = torch.zeros((len(sequences), max(lengths)), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    with _full_precision_head(loaded.model):
        output = loaded.model(input_ids=ids.to(loaded.device), use_cache=False)
    rows = output.logits.float().cpu()
    return [rows[row, :length] for row, length in enumerate(lengths)]


@contextmanager
def _full_precision_head(model: Any) -> Iterator[None]:
    """Inside, the last matrix product of a half-precision model is taken in FP32.

    The weights stay what they are. A quantized head computes as its scheme says, and what a model
    does to logits after its head (a scale, a soft cap) is done to FP32 numbers.
    """
    head = model.get_output_embeddings()
    is_plain = type(head) is nn.Linear and head.weight.dtype in (torch.bfloat16, torch.float16)
    if not is_plain:
        yield
        return
    weight = head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    head.forward = lambda hidden: functional.linear(hidden.float(), weight, bias)
    try:
        yield
    finally:
        # An attribute of this one module, which hid the method of its class.
        del head.forward
