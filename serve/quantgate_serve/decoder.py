"""From the tokens of a step to logits: through transformers' own forward, or a shorter way.

`ShortDecoder` computes what a Llama-like layer computes, with fewer calls: query, key and value in
one product, one rotation for both, a sum and its norm at once (by native kernels; in torch a norm
is four operations). It takes the weights (also quantized Linears, as they are) out of the loaded
model. Where all of these are plain and in FP32, or codes of coded.py, native/decoder.py computes
the layers without torch. Every other model goes through its own forward.

Shapes: T tokens of the step, R rows to read, C hidden size, N query heads, K key heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from quantgate_serve import coded, fused_int8, linear
from quantgate_serve.attention.interface import AttentionStep
from quantgate_serve.attention.native_paged import NativeStep
from quantgate_serve.native.decoder import NativeDecoder
from quantgate_serve.native.decoder_layers import can_decode
from quantgate_serve.native.layer import LANES, LayerKernels

# Layers whose computation is exactly the one written here.
_SHORT = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)

Step = AttentionStep | NativeStep
# (step, layer, query [T, N, D], key [T, K, D], value [T, K, D], scale) -> [T, N, D]
Attend = Callable[[Step, int, Tensor, Tensor, Tensor, float], Tensor]


class WholeDecoder(nn.Module):
    """The model's own forward; its attention is reached by the name it was loaded with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, ids: Tensor, positions: Tensor, step: Step, rows: Tensor) -> Tensor:
        """Logits [R, V] after the tokens `rows` of `ids` [T]."""
        output = self.model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
            quantgate_step=step,
        )
        logits: Tensor = output.logits[0]
        return logits

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()


class ShortDecoder(nn.Module):
    """A Llama-like decoder. `model` is taken apart and of no use afterwards."""

    def __init__(self, model: Any, attend: Attend, kernels: LayerKernels | None) -> None:
        super().__init__()
        base = model.model
        self.config = model.config
        self.embed_tokens = base.embed_tokens
        self.rotary = base.rotary_emb
        self.layers = nn.ModuleList()
        for index in range(len(base.layers)):
            self.layers.append(ShortLayer(base.layers[index], index, attend, kernels))
            base.layers[index] = nn.Identity()  # frees what was packed, before the next is
        self._forwards = [layer.forward for layer in self.layers]
        self.norm = _norm(base.norm, kernels)
        self.lm_head = linear.prepare(model.lm_head)
        self._kernels = kernels

    def forward(self, ids: Tensor, positions: Tensor, step: Step, rows: Tensor) -> Tensor:
        """Logits [R, V] after the tokens `rows` of `ids` [T]."""
        hidden = self.embed_tokens(ids)
        cos, sin = self.rotary(hidden, positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        rotation = Rotation(cos[0, :, None, :half], sin[0, :, None, :half], self._kernels)
        delta = None
        # forward() itself: a module's call looks for hooks, and there are 40 calls in a step.
        for layer in self._forwards:
            delta = layer(hidden, delta, rotation, step)
        hidden += delta
        logits: Tensor = self.lm_head(self.norm(hidden[rows]))
        return logits

    def get_input_embeddings(self) -> nn.Module:
        module: nn.Module = self.embed_tokens
        return module

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class ShortLayer(nn.Module):
    """Attention and MLP of one layer over x [T, C]."""

    def __init__(
        self, layer: Any, index: int, attend: Attend, kernels: LayerKernels | None
    ) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index = index
        self.attend = attend
        self.head_dim = int(attention.head_dim)
        self.scale = float(attention.scaling)
        self.num_heads = int(attention.config.num_attention_heads)
        self.num_rotated = self.num_heads + int(attention.config.num_key_value_heads)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        # Rotation pairs channel i with i + D / 2. Where rows can be moved, each pair is put side by
        # side: then it is one complex number, and a rotation one product.
        self.is_paired = all(linear.is_plain(projection) for projection in projections)
        if self.is_paired:
            orders = [_pairing(p.weight.shape[0], self.head_dim) for p in projections[:2]]
            self.qkv = linear.join(projections, [*orders, None])
        else:
            self.qkv = (
                coded.join(projections)
                or fused_int8.join(projections)
                or linear.SideBySide(projections)
            )
        del attention.q_proj, attention.k_proj, attention.v_proj, projections
        self.o_proj = linear.prepare(attention.o_proj)
        self.gated = (
            coded.join([mlp.gate_proj, mlp.up_proj], is_gated=True)
            or fused_int8.join_gate(mlp.gate_proj, mlp.up_proj)
            or linear.Gated(linear.prepare(mlp.gate_proj), linear.prepare(mlp.up_proj))
        )
        self.down_proj = linear.prepare(mlp.down_proj)
        self.input_norm = _norm(layer.input_layernorm, kernels)
        self.post_attention_norm = _norm(layer.post_attention_layernorm, kernels)
        self._qkv = self.qkv.forward
        self._o_proj = self.o_proj.forward
        self._gated = self.gated.forward
        self._down_proj = self.down_proj.forward

    def forward(
        self, hidden: Tensor, delta: Tensor | None, rotation: "Rotation", step: Step
    ) -> Tensor:
        """What is to be added to `hidden` [T, C], after adding `delta` and attention to it."""
        x = _add_norm(self.input_norm, hidden, delta)
        heads = self._qkv(x).view(len(hidden), -1, self.head_dim)
        rotated, value = heads[:, : self.num_rotated], heads[:, self.num_rotated :]
        if self.is_paired:
            rotated = rotation.of_pairs(rotated)
        else:
            rotated = rotation.of_halves(rotated)
        query, key = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        mixed = self.attend(step, self.index, query, key, value, self.scale)
        x = _add_norm(self.post_attention_norm, hidden, self._o_proj(mixed.reshape(len(x), -1)))
        change: Tensor = self._down_proj(self._gated(x))
        return change


class Rotation:
    """The rotary position of each token of a step: cos and sin are [T, 1, D / 2]."""

    def __init__(self, cos: Tensor, sin: Tensor, kernels: LayerKernels | None) -> None:
        self._cos, self._sin = cos, sin
        self._kernels = kernels
        self._complex: Tensor | None = None

    def of_pairs(self, x: Tensor) -> Tensor:
        """Rotates channels (0, 1), (2, 3), … of x [T, heads, D], in place."""
        if self._is_native(x):
            return self._rotate_natively(x, is_paired=True)
        if x.dtype != torch.float32:
            first, second = x[..., 0::2], x[..., 1::2]
            return torch.stack(self._rotate(first, second), dim=-1).flatten(-2)
        if self._complex is None:
            self._complex = torch.complex(self._cos, self._sin)
        torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(self._complex)
        return x

    def of_halves(self, x: Tensor) -> Tensor:
        """Rotates channels (0, D/2), (1, D/2 + 1), … of x [T, heads, D], perhaps in place."""
        if self._is_native(x):
            return self._rotate_natively(x, is_paired=False)
        first, second = x.chunk(2, dim=-1)
        return torch.cat(self._rotate(first, second), dim=-1)

    def _is_native(self, x: Tensor) -> bool:
        return self._kernels is not None and x.dtype == self._cos.dtype == torch.float32

    def _rotate_natively(self, x: Tensor, *, is_paired: bool) -> Tensor:
        if self._kernels is not None:
            self._kernels.rotate(x, self._cos[:, 0], self._sin[:, 0], is_paired=is_paired)
        return x

    def _rotate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._cos, self._sin
        return first * cos - second * sin, second * cos + first * sin


class ShortNorm(nn.Module):
    """RMS norm in FP32: four operations, two of them over a single column."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self._share = 1 / len(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._eps = torch.tensor(eps, device=weight.device)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, length, length, value=self._share).rsqrt_()
        return (x * scale).mul_(self.weight)


class NativeNorm(nn.Module):
    """RMS norm in FP32 by a native kernel, which adds to its input first."""

    def __init__(self, weight: Tensor, eps: float, kernels: LayerKernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self._eps = eps
        self._kernels = kernels

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Adds `delta` to `x` [T, C] in place; the norm of the sum."""
        return self._kernels.add_norm(x, delta, self.weight, self._eps)


def build_decoder(model: Any, attend: Attend, kernels: LayerKernels | None = None) -> nn.Module:
    """The shortest way through `model` that is known; `model` is not to be used afterwards.

    `kernels` only where the model is on the CPU.
    """
    if _is_short(model):
        if kernels is not None and can_decode(model, kernels):
            return NativeDecoder(model, kernels)
        return ShortDecoder(model, attend, kernels)
    linear.prepare_all(model)
    return WholeDecoder(model)


def as_decoder(model: Any) -> nn.Module:
    """`model` if it is a decoder of this file, else its own forward, the model left whole."""
    return (
        model
        if isinstance(model, NativeDecoder | ShortDecoder | WholeDecoder)
        else WholeDecoder(model)
    )


def _is_short(model: Any) -> bool:
    layers = getattr(getattr(model, "model", None), "layers", None) or ()
    return (
        len(layers) > 0
        and all(type(layer) in _SHORT for layer in layers)
        and model.config.hidden_act == "silu"
    )


def _norm(norm: Any, kernels: LayerKernels | None) -> nn.Module:
    if norm.weight.dtype != torch.float32:
        module: nn.Module = norm
        return module
    weight, eps = norm.weight.detach(), float(norm.variance_epsilon)
    if kernels is not None and len(weight) % LANES == 0:
        return NativeNorm(weight, eps, kernels)
    return ShortNorm(weight, eps)


def _add_norm(norm: nn.Module, hidden: Tensor, delta: Tensor | None) -> Tensor:
    """Add `delta` to `hidden` [T, C] in place; the norm of the sum."""
    if isinstance(norm, NativeNorm):
        return norm.forward(hidden, delta)
    if delta is not None:
        hidden += delta
    normed: Tensor = norm.forward(hidden)
    return normed


def _pairing(num_rows: int, head_dim: int) -> Tensor:
    """The order of a projection's rows that puts channel i beside i + D / 2 in every head."""
    order = torch.arange(num_rows).view(-1, 2, head_dim // 2)
    return order.transpose(1, 2).reshape(-1)
