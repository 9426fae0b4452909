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

from quantgate_serve.coded import CodedLinear
from quantgate_serve.finite import all_finite
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.native.angles import Angles, Integers
from quantgate_serve.native.decoder_layers import (
    CodedLayer,
    LayerFacts,
    LinearFacts,
    describe_linear,
    make_head,
    make_layer,
)
from quantgate_serve.native.layer import LayerKernels
from quantgate_serve.native.library import FLOAT, INT, POINTER
from quantgate_serve.native.linear import NativeLinear
from quantgate_serve.native.workspace import Workspace

# What decoder.c counts its nanoseconds as, in this order.
PARTS = ("embedding", "Linears", "norms", "rotation and KV writes", "attention", "logits")
# Products of weights and tokens below which one thread is faster than a team.
_MIN_PRODUCTS = 1 << 20
# What decoder.c says of a step that it cannot compute.
_NO_EMBEDDING, _NO_ANGLES = -1, -2


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", POINTER),
        *((name, INT) for name in ("num_layers", "num_heads", "kv_heads", "dim", "hidden")),
        *((name, FLOAT) for name in ("eps", "scale")),
        ("last_norm", POINTER),
        ("head", LinearFacts),
    )


_ROOM = (
    *("hidden", "qkv", "mixed", "middle", "normed", "scratch"),
    *("slots", "turns", "blocks", "is_read"),
)


class _Step(ctypes.Structure):
    _fields_ = (
        ("embedding", POINTER),
        ("num_embeddings", INT),
        *((name, POINTER) for name in ("cos", "sin")),
        *((name, INT) for name in ("num_angles", "are_by_token")),
        ("ids", POINTER),
        ("tokens", INT),
        ("chunks", POINTER),
        ("num_chunks", INT),
        ("table", POINTER),
        ("table_width", INT),
        ("rows", POINTER),
        ("num_rows", INT),
        *((name, POINTER) for name in ("keys", "values")),
        *((name, POINTER) for name in _ROOM),
        *((name, POINTER) for name in ("read", "logits", "best")),
        ("is_finite", INT),
    )


@dataclass(slots=True)
class Computed:
    """What a step gave.

    `best` [R] is the largest of each row of logits, the first of equals. `is_finite` says that no
    logit is NaN and that each row's largest is finite. `memory` [R or more, V] holds the logits.
    """

    memory: Tensor
    best: list[int]
    is_finite: bool

    @property
    def logits(self) -> Tensor:
        """[R, V]; the next step may write over them."""
        return self.memory[: len(self.best)]


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
        layers = []
        for index in range(len(base.layers)):
            layers.append(make_layer(base.layers[index], kernels))
            base.layers[index] = nn.Identity()  # frees what was packed, before the next is
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Parameter(base.norm.weight.detach().contiguous(), requires_grad=False)
        self.lm_head = make_head(model.lm_head, kernels)
        # Where the time of the layers goes, by PARTS, for who puts a tensor of int64 here.
        self.spent_ns: Tensor | None = None
        self._num_weights = sum(
            module.in_features * module.out_features
            for module in self.layers.modules()
            if isinstance(module, NativeLinear | CodedLinear)
        )
        self._kernels = kernels
        self._angles = Angles(base.rotary_emb)
        self._kv: KVStorage | None = None
        self._table: NDArray[np.int32] | None = None
        weight = self.embed_tokens.weight
        self._embedding = _End(
            self.embed_tokens,
            is_known=type(self.embed_tokens) is nn.Embedding and weight.dtype == torch.float32,
        )
        self._rows_of_embedding = weight.data_ptr(), len(weight)
        head = LinearFacts()
        if isinstance(self.lm_head, NativeLinear):
            head = describe_linear(self.lm_head)
        self._head = _End(self.lm_head, is_known=isinstance(self.lm_head, NativeLinear))
        self._workspace = Workspace(
            self.config,
            int(attention.head_dim),
            has_codes=any(isinstance(layer, CodedLayer) for layer in layers),
            num_logits=int(head.width),
        )
        self._layers = (LayerFacts * len(layers))(*(layer.describe() for layer in layers))
        self._facts = _Decoder(
            ctypes.addressof(self._layers),
            len(layers),
            self._workspace.num_heads,
            self._workspace.kv_heads,
            self._workspace.head_dim,
            self._workspace.hidden,
            float(base.norm.variance_epsilon),
            float(attention.scaling),
            self.norm.data_ptr(),
            head,
        )
        # Kept from step to step, like the room that it names.
        self._step = _Step()
        self._room: list[int] = []
        self._described = ctypes.addressof(self._facts), ctypes.addressof(self._step)

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
        step = self._step
        step.embedding, step.num_embeddings = self._rows_of_embedding
        # One that is watched or of another kind is called, so that who watches it sees it.
        if self._embedding.is_called:
            embedded = _call(self.embed_tokens, torch.tensor(ids))
            step.embedding, step.num_embeddings = embedded.data_ptr(), len(embedded)
            ids = array("q", range(len(ids)))
        threads = self._prepare(kv, ids, chunks, table, rows)
        is_called = self._head.is_called
        read, logits = self._workspace.results(len(rows))
        step.read, step.logits = read.address, None if is_called else logits.address
        best = array("q", bytes(8 * len(rows)))
        step.best = _address(best)
        self._decode(threads)
        if not is_called:
            return Computed(logits.tensor, best.tolist(), bool(step.is_finite))
        found = _call(self.lm_head, read.tensor[: len(rows)])
        return Computed(found, found.argmax(dim=-1).tolist(), bool(all_finite(found)))

    def get_input_embeddings(self) -> nn.Module:
        module: nn.Module = self.embed_tokens
        return module

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _prepare(
        self,
        kv: KVStorage,
        ids: Integers,
        chunks: Integers,
        table: NDArray[np.int32],
        rows: Integers,
    ) -> int:
        """Describe the step, but for its embedding and its results; how many threads it takes."""
        step, tokens = self._step, len(ids)
        step.ids, step.tokens = _address(ids), tokens
        step.chunks, step.num_chunks = _address(chunks), len(chunks) // 3
        if table is not self._table:
            self._table = table
            step.table, step.table_width = table.ctypes.data, table.shape[1]
        step.rows, step.num_rows = _address(rows), len(rows)
        step.cos, step.sin, step.num_angles, step.are_by_token = self._angles.of(chunks)
        threads = torch.get_num_threads() if tokens * self._num_weights > _MIN_PRODUCTS else 1
        room = self._workspace.of(max(tokens, len(rows)), threads)
        if room is not self._room:
            self._room = room
            for name, address in zip(_ROOM, room, strict=True):
                setattr(step, name, address)
        if kv is not self._kv:
            self._kv = kv
            addresses = POINTER * len(kv.keys)
            self._keys = addresses(*(tensor.data_ptr() for tensor in kv.keys))
            self._values = addresses(*(tensor.data_ptr() for tensor in kv.values))
            step.keys, step.values = map(ctypes.addressof, (self._keys, self._values))
        return threads

    def _decode(self, threads: int) -> None:
        """Compute the step that is described."""
        step = self._step
        spent = None if self.spent_ns is None else self.spent_ns.data_ptr()
        error = self._kernels.decode(*self._described, threads, spent)
        while error == _NO_ANGLES:
            step.cos, step.sin, step.num_angles = self._angles.more()
            error = self._kernels.decode(*self._described, threads, spent)
        if error == _NO_EMBEDDING:
            raise IndexError(
                f"of {step.tokens} ids one is not among the {step.num_embeddings} embeddings"
            )


class _End:
    """The embedding or the head: decoder.c computes one that is known, unless it is watched."""

    def __init__(self, module: nn.Module, *, is_known: bool) -> None:
        self.is_known = is_known
        self._module = module

    @property
    def is_called(self) -> bool:
        """Whether somebody sees that it is called, or decoder.c cannot do what calling it does."""
        module = self._module
        return not self.is_known or bool(module._forward_pre_hooks or module._forward_hooks)


@torch.inference_mode()
def _call(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x)
    return result


def _address(numbers: Integers) -> int:
    return numbers.buffer_info()[0]
