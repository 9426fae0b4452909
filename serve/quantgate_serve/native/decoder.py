"""A Llama-like decoder in one call of decoder.c, from ids to logits: no torch in between.

Shapes: T tokens of the step, R rows to read, C hidden size, N query heads, K key heads, D head dim.
"""

import ctypes
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantgate_serve import coded, huge_pages, linear
from quantgate_serve.coded import CodedLinear, CodedProduct
from quantgate_serve.finite import all_finite
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.native.angles import Angles, Integers
from quantgate_serve.native.layer import LANES, MAX_HEAD_DIM, MAX_ROWS, LayerKernels
from quantgate_serve.native.linear import NativeLinear, alternate, can_multiply, packed_size, stack
from quantgate_serve.native.workspace import Workspace

# What decoder.c counts its nanoseconds as, in this order.
PARTS = ("embedding", "Linears", "norms", "rotation and KV writes", "attention", "logits")
# Products of weights and tokens below which one thread is faster than a team.
_MIN_PRODUCTS = 1 << 20
# What decoder.c says of a step that it cannot compute.
_NO_EMBEDDING, _NO_ANGLES = -1, -2

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Linear(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("depth", _INT), ("width", _INT))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", _POINTER),
        ("post_norm", _POINTER),
        ("qkv", _Linear),
        ("output", _Linear),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("codes", _POINTER * 4),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", _POINTER),
        *((name, _INT) for name in ("num_layers", "num_heads", "kv_heads", "dim", "hidden")),
        *((name, _FLOAT) for name in ("eps", "scale")),
        ("last_norm", _POINTER),
        ("head", _Linear),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("embedding", _POINTER),
        ("num_embeddings", _INT),
        *((name, _POINTER) for name in ("cos", "sin")),
        *((name, _INT) for name in ("num_angles", "are_by_token")),
        ("ids", _POINTER),
        ("tokens", _INT),
        ("chunks", _POINTER),
        ("num_chunks", _INT),
        ("table", _POINTER),
        ("table_width", _INT),
        ("rows", _POINTER),
        ("num_rows", _INT),
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _POINTER) for name in ("hidden", "qkv", "mixed", "middle", "normed", "scratch")),
        *((name, _POINTER) for name in ("slots", "turns", "blocks", "is_read")),
        *((name, _POINTER) for name in ("read", "logits", "best")),
        ("is_finite", _INT),
    )


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step gave.

    `logits` are [R, V]; `best` [R] is the largest of each row, the first of equals. `is_finite`
    says that no logit is NaN and that each row's largest is finite.
    """

    logits: Tensor
    best: list[int]
    is_finite: bool


class NativeDecoder(nn.Module):
    """A Llama-like decoder in FP32. `model` is taken apart and of no use afterwards."""

    def __init__(self, model: Any, kernels: LayerKernels) -> None:
        """`model` is one that `can_decode` accepts."""
        super().__init__()
        base = model.model
        attention = base.layers[0].self_attn
        self.config = model.config
        self.embed_tokens = base.embed_tokens
        self.rotary = base.rotary_emb
        self._angles = Angles(base.rotary_emb)
        layers: list[_NativeLayer | _CodedLayer] = []
        for index in range(len(base.layers)):
            made = _coded_layer(base.layers[index]) or _NativeLayer(base.layers[index], kernels)
            layers.append(made)
            base.layers[index] = nn.Identity()  # frees what was packed, before the next is
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Parameter(base.norm.weight.detach().contiguous(), requires_grad=False)
        self.lm_head = _head(model.lm_head, kernels)
        # Where the time of the layers goes, by PARTS, for who puts a tensor of int64 here.
        self.spent_ns: Tensor | None = None
        self._kernels = kernels
        self._eps = float(base.norm.variance_epsilon)
        has_codes = any(isinstance(layer, _CodedLayer) for layer in self.layers)
        self._workspace = Workspace(self.config, int(attention.head_dim), has_codes=has_codes)
        head = _describe(self.lm_head) if isinstance(self.lm_head, NativeLinear) else _Linear()
        self._layers = (_Layer * len(layers))(*(layer.describe() for layer in layers))
        self._facts = _Decoder(
            ctypes.addressof(self._layers),
            len(layers),
            self._workspace.num_heads,
            self._workspace.kv_heads,
            self._workspace.head_dim,
            self._workspace.hidden,
            self._eps,
            float(attention.scaling),
            self.norm.data_ptr(),
            head,
        )
        self._num_weights = sum(
            module.in_features * module.out_features
            for module in self.layers.modules()
            if isinstance(module, NativeLinear | CodedLinear)
        )
        self._num_logits = int(head.width)
        self._kv: KVStorage | None = None

    def compute(
        self,
        kv: KVStorage,
        ids: Integers,
        chunks: Integers,
        table: NDArray[np.int32],
        rows: Integers,
    ) -> Computed:
        """The logits after the tokens `rows` of `ids` [T].

        Three numbers in `chunks` are a row of `table` [sequences, pages], the position of a chunk's
        first token, and how many of the next tokens it has. All are of 64 bits but the table.

        Raises:
            IndexError: an id has no embedding.
        """
        if _is_just(self.embed_tokens, nn.Embedding):
            return self._compute(kv, self.embed_tokens.weight, ids, chunks, table, rows)
        # One that is watched or of another kind is called, so that who watches it sees it.
        embedded = self.embed_tokens(torch.tensor(ids))
        return self._compute(kv, embedded, array("q", range(len(ids))), chunks, table, rows)

    def get_input_embeddings(self) -> nn.Module:
        module: nn.Module = self.embed_tokens
        return module

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _compute(
        self,
        kv: KVStorage,
        embedding: Tensor,
        ids: Integers,
        chunks: Integers,
        table: NDArray[np.int32],
        rows: Integers,
    ) -> Computed:
        """As compute(), each token's embedding being the row of `embedding` that `ids` has."""
        tokens, count = len(ids), len(rows)
        threads = torch.get_num_threads() if tokens * self._num_weights > _MIN_PRODUCTS else 1
        keys, values = self._addresses(kv)
        room = self._workspace.of(max(tokens, count), threads)
        angles = self._angles.of(chunks)
        # A head that is watched is called, too.
        is_whole = _is_just(self.lm_head, NativeLinear)
        read = torch.empty(count, self._workspace.hidden)
        logits = torch.empty(count, self._num_logits if is_whole else 0)
        best = array("q", bytes(8 * count))
        facts = _Step(
            embedding.data_ptr(),
            len(embedding),
            *angles,
            _address(ids),
            tokens,
            _address(chunks),
            len(chunks) // 3,
            table.ctypes.data,
            table.shape[1],
            _address(rows),
            count,
            ctypes.addressof(keys),
            ctypes.addressof(values),
            *room,
            read.data_ptr(),
            logits.data_ptr() if is_whole else None,
            _address(best),
        )
        spent = None if self.spent_ns is None else self.spent_ns.data_ptr()
        described = ctypes.addressof(self._facts), ctypes.addressof(facts), threads, spent
        error = self._kernels.decode(*described)
        while error == _NO_ANGLES:
            facts.cos, facts.sin, facts.num_angles = self._angles.more()
            error = self._kernels.decode(*described)
        if error == _NO_EMBEDDING:
            raise IndexError(f"of {tokens} ids one is not among the {len(embedding)} embeddings")
        if is_whole:
            return Computed(logits, best.tolist(), bool(facts.is_finite))
        logits = self.lm_head(read)
        return Computed(logits, logits.argmax(dim=-1).tolist(), bool(all_finite(logits)))

    def _addresses(self, kv: KVStorage) -> tuple[Any, Any]:
        """Where the keys and values of each layer lie; kept as long as the storage is the same."""
        if self._kv is not kv:
            self._kv = kv
            addresses = _POINTER * len(kv.keys)
            self._keys = addresses(*(tensor.data_ptr() for tensor in kv.keys))
            self._values = addresses(*(tensor.data_ptr() for tensor in kv.values))
        return self._keys, self._values


class _NativeLayer(nn.Module):
    """The weights of one layer, one after another in the same huge pages."""

    def __init__(self, layer: Any, kernels: LayerKernels) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        sizes = [packed_size(part.weight) for part in _linears(layer)]
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
            bias = alternate(gate[1], up[1])
        self.gate_up = NativeLinear(alternate(gate[0], up[0]), bias, kernels, room=gate_up)
        self.down = NativeLinear(*_parts(mlp.down_proj), kernels, room=down)
        self.input_norm = _norm(layer.input_layernorm)
        self.post_norm = _norm(layer.post_attention_layernorm)

    def describe(self) -> _Layer:
        return _Layer(
            self.input_norm.data_ptr(),
            self.post_norm.data_ptr(),
            *(_describe(part) for part in (self.qkv, self.output, self.gate_up, self.down)),
        )


class _CodedLayer(nn.Module):
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

    def describe(self) -> _Layer:
        parts = (self.qkv, self.output, self.gate_up, self.down)
        return _Layer(
            self.input_norm.data_ptr(),
            self.post_norm.data_ptr(),
            codes=(_POINTER * 4)(*(part.product.address for part in parts)),
        )


def can_decode(model: Any) -> bool:
    """Whether decoder.c is written for this Llama-like model on a CPU.

    Its Linears are plain and in FP32, or all of a layer are codes of quantized.c.
    """
    head_dim, config = int(model.model.layers[0].self_attn.head_dim), model.config
    return (
        all(_has_codes(layer) or _is_plain(layer) for layer in model.model.layers)
        and head_dim % LANES == 0
        and head_dim <= MAX_HEAD_DIM
        and config.num_attention_heads // config.num_key_value_heads <= MAX_ROWS
        and config.intermediate_size % LANES == 0
        and model.model.norm.weight.dtype == torch.float32
    )


def _is_plain(layer: Any) -> bool:
    return all(linear.is_plain(part) and can_multiply(part.weight) for part in _linears(layer))


def _has_codes(layer: Any) -> bool:
    *qkv, output, gate, up, down = _linears(layer)
    return (
        coded.can_join(qkv)
        and coded.can_join([gate, up], is_gated=True)
        and isinstance(output, CodedLinear)
        and isinstance(down, CodedLinear)
        and output.kernels.lanes == LANES
    )


def _coded_layer(layer: Any) -> _CodedLayer | None:
    *qkv, output, gate, up, down = _linears(layer)
    joined, gated = coded.join(qkv), coded.join([gate, up], is_gated=True)
    if not _has_codes(layer) or joined is None or gated is None:
        return None
    return _CodedLayer(layer, qkv=joined, gate_up=gated, linears=[output, down])


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


def _head(head: nn.Linear, kernels: LayerKernels) -> nn.Module:
    if linear.is_plain(head) and can_multiply(head.weight):
        return NativeLinear(*_parts(head), kernels)
    return linear.prepare(head)


def _address(numbers: Integers) -> int:
    return numbers.buffer_info()[0]


def _is_just(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what a `kind` in FP32 does, and nothing else sees it."""
    return (
        type(module) is kind
        and module.weight.dtype == torch.float32
        and not module._forward_pre_hooks
        and not module._forward_hooks
    )


def _describe(part: NativeLinear) -> _Linear:
    bias = None if part.bias is None else part.bias.data_ptr()
    return _Linear(part.weight.data_ptr(), bias, part.in_features, part.out_features)
