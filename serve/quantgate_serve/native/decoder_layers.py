"""The weights of a decoder's layers as decoder.c reads them, and which models it is written for."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from quantgate_serve import coded, huge_pages, linear
from quantgate_serve.coded import CodedLinear, CodedProduct
from quantgate_serve.native.layer import LANES, MAX_HEAD_DIM, MAX_ROWS, LayerKernels
from quantgate_serve.native.library import INT, POINTER
from quantgate_serve.native.linear import (
    FEWEST_LANES,
    NativeLinear,
    alternate,
    can_multiply,
    packed_size,
    stack,
)


class LinearFacts(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("bias", POINTER), ("depth", INT), ("width", INT))


class LayerFacts(ctypes.Structure):
    _fields_ = (
        ("input_norm", POINTER),
        ("post_norm", POINTER),
        ("qkv", LinearFacts),
        ("output", LinearFacts),
        ("gate_up", LinearFacts),
        ("down", LinearFacts),
        ("codes", POINTER * 4),
    )


class NativeLayer(nn.Module):
    """The weights of one layer, one after another in the same huge pages."""

    def __init__(self, layer: Any, kernels: LayerKernels) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        sizes = [packed_size(part.weight, kernels.lanes) for part in _linears(layer)]
        room = huge_pages.zeros((sum(sizes),), torch.float32)
        qkv, output, gate_up, down = torch.split(
            room, [sum(sizes[:3]), sizes[3], sum(sizes[4:6]), sizes[6]]
        )
        joined = [_parts(attention.q_proj), _parts(attention.k_proj), _parts(attention.v_proj)]
        self.qkv = NativeLinear(*stack(joined), kernels, room=qkv)
        self.output = NativeLinear(*_parts(attention.o_proj), kernels, room=output)
        gate, up = _parts(mlp.gate_proj), _parts(mlp.up_proj)
        bias = None
        if gate[1] is not None and up[1] is not None:
            bias = alternate(gate[1], up[1], kernels.lanes)
        self.gate_up = NativeLinear(
            alternate(gate[0], up[0], kernels.lanes), bias, kernels, room=gate_up
        )
        self.down = NativeLinear(*_parts(mlp.down_proj), kernels, room=down)
        self.input_norm = _norm(layer.input_layernorm)
        self.post_norm = _norm(layer.post_attention_layernorm)

    def describe(self) -> LayerFacts:
        return LayerFacts(
            self.input_norm.data_ptr(),
            self.post_norm.data_ptr(),
            *(describe_linear(part) for part in (self.qkv, self.output, self.gate_up, self.down)),
        )


class CodedLayer(nn.Module):
    """The weights of one layer as codes."""

    def __init__(
        self, layer: Any, *, qkv: CodedProduct, gate_up: CodedProduct, linears: list[CodedLinear]
    ) -> None:
        """`linears` are the output and the down projection."""
        super().__init__()
        self.qkv, self.gate_up = qkv, gate_up
        self.output, self.down = linears
        self.input_norm = _norm(layer.input_layernorm)
        self.post_norm = _norm(layer.post_attention_layernorm)

    def describe(self) -> LayerFacts:
        parts = (self.qkv, self.output, self.gate_up, self.down)
        return LayerFacts(
            self.input_norm.data_ptr(),
            self.post_norm.data_ptr(),
            codes=(POINTER * 4)(*(part.product.address for part in parts)),
        )


def can_decode(model: Any, kernels: LayerKernels) -> bool:
    """Whether decoder.c is written for this Llama-like model on a CPU.

    Its Linears are plain and in FP32, or all of a layer are codes of quantized.c.
    """
    head_dim, config = int(model.model.layers[0].self_attn.head_dim), model.config
    return (
        all(_has_codes(layer) or _is_plain(layer, kernels) for layer in model.model.layers)
        and head_dim % LANES == 0
        and head_dim <= MAX_HEAD_DIM
        and config.num_attention_heads // config.num_key_value_heads <= MAX_ROWS
        and config.hidden_size % LANES == 0
        and config.intermediate_size % LANES == 0
        and model.model.norm.weight.dtype == torch.float32
    )


def make_layer(layer: Any, kernels: LayerKernels) -> NativeLayer | CodedLayer:
    """The weights of a layer of a model that `can_decode` accepts; the layer is taken apart."""
    return _join_codes(layer) or NativeLayer(layer, kernels)


def make_head(head: nn.Linear, kernels: LayerKernels) -> nn.Module:
    """A NativeLinear where the kernels are written for this head, else the best that torch has."""
    is_known = linear.is_plain(head) and can_multiply(head.weight, kernels)
    if is_known and head.out_features % LANES == 0:
        return NativeLinear(*_parts(head), kernels)
    return linear.prepare(head)


def describe_linear(part: NativeLinear) -> LinearFacts:
    """`part` as decoder.c reads it."""
    bias = None if part.bias is None else part.bias.data_ptr()
    return LinearFacts(part.weight.data_ptr(), bias, part.in_features, part.out_features)


def _is_plain(layer: Any, kernels: LayerKernels) -> bool:
    return all(
        linear.is_plain(part) and can_multiply(part.weight, kernels) for part in _linears(layer)
    )


def _has_codes(layer: Any) -> bool:
    *qkv, output, gate, up, down = _linears(layer)
    return (
        coded.can_join(qkv)
        and coded.can_join([gate, up], is_gated=True)
        and isinstance(output, CodedLinear)
        and isinstance(down, CodedLinear)
        and output.kernels.lanes >= FEWEST_LANES
    )


def _join_codes(layer: Any) -> CodedLayer | None:
    *qkv, output, gate, up, down = _linears(layer)
    joined, gated = coded.join(qkv), coded.join([gate, up], is_gated=True)
    if not _has_codes(layer) or joined is None or gated is None:
        return None
    return CodedLayer(layer, qkv=joined, gate_up=gated, linears=[output, down])


def _linears(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


def _parts(plain: Any) -> tuple[Tensor, Tensor | None]:
    return plain.weight.detach(), None if plain.bias is None else plain.bias.detach()


def _norm(norm: Any) -> nn.Parameter:
    return nn.Parameter(norm.weight.detach().contiguous(), requires_grad=False)
