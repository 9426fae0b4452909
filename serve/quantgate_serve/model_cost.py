"""Reads from a loaded model what its steps cost (`roofline.ModelCost`)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from quantgate_serve.kv.storage import KVShape
from quantgate_serve.roofline import ModelCost


def read_cost(model: Any, kv_shape: KVShape) -> ModelCost | None:
    """The cost of `model`, or None where its weights are not all Linears that every token meets.

    (A mixture of experts reads only some of its weights in a step, so the formulas would lie.)
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    linears = [module for module in model.modules() if _is_linear(module)]
    known = {id(tensor) for module in [*tables, *linears] for tensor in _tensors(module)}
    if any(parameter.dim() > 1 and id(parameter) not in known for parameter in model.parameters()):
        return None
    stored = {id(t): _num_bytes(t) for module in model.modules() for t in _tensors(module)}
    gathered = {id(table.weight) for table in tables} - {id(head.weight)}
    config = model.config.get_text_config()
    return ModelCost(
        step_bytes=sum(size for key, size in stored.items() if key not in gathered),
        row_bytes=sum(t.weight.element_size() * t.embedding_dim for t in tables),
        layer_weights=sum(_num_weights(linear) for linear in linears if linear is not head),
        head_weights=_num_weights(head),
        kv_bytes=kv_shape.bytes_per_token,
        attention_width=kv_shape.num_layers * int(config.num_attention_heads) * kv_shape.head_dim,
    )


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def _num_weights(linear: Any) -> int:
    if hasattr(linear, "in_features"):
        return int(linear.in_features) * int(linear.out_features)
    return int(linear.weight.numel())  # transformers' Conv1D (GPT-2)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """What `module` itself stores, with the scales that bitsandbytes keeps beside its weights."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    weight: Any = getattr(module, "weight", None)
    for holder in (weight, getattr(weight, "quant_state", None)):
        for name in ("SCB", "absmax"):
            scale = getattr(holder, name, None)
            if isinstance(scale, Tensor):
                yield scale


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
