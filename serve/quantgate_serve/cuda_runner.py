"""The runner's forward on CUDA: inputs in one copy, Triton decode, varlen prompts, decode graphs.

Runs on any device (the tests run it on the CPU with the plain-torch decode), so that only the
kernels, the pinned copies and the recording itself need a GPU to be tried.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantgate_serve.attention.cuda_paged import (
    CudaStep,
    Decode,
    DecodeBatch,
    PackedPrompts,
)
from quantgate_serve.graphs import Capture, DecodeGraphs, DecodeInputs, batch_sizes, why_not
from quantgate_serve.kernels import Kernel
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.loading import LoadedModel
from quantgate_serve.metrics import EngineMetrics
from quantgate_serve.runner import Runner
from quantgate_serve.scheduler import Chunk
from quantgate_serve.staging import Staging

_log = logging.getLogger(__name__)


class CudaRunner(Runner):
    """Computes steps on CUDA."""

    def __init__(
        self,
        loaded: LoadedModel,
        kv: KVStorage,
        metrics: EngineMetrics,
        *,
        decode: Decode,
        num_splits: Callable[[int, int], int],
    ) -> None:
        """`num_splits` gives the decode's splits for a batch and its longest sequence."""
        super().__init__(loaded, kv)
        self._model = loaded.model
        self._metrics = metrics
        self._decode = decode
        self._num_splits = num_splits
        self._staging = Staging(loaded.device)
        self._max_pages = -(-loaded.context_length // kv.page_size)
        self._head_rows = torch.arange(kv.shape.num_kv_heads, device=loaded.device)
        self._graphs: DecodeGraphs | None = None
        self._graph_logits: Tensor | None = None

    def record_graphs(
        self, kernels: Iterable[Kernel], *, max_batch_size: int, capture: Capture
    ) -> None:
        """Record decode steps of up to `max_batch_size` sequences, or log why that cannot be."""
        reason = why_not(kernels)
        if reason is not None:
            _log.warning("no CUDA graphs for this model: %s", reason)
            return
        self._metrics.graph_hits = 0
        self._metrics.graph_misses = Counter()
        before = _reserved_bytes(self._device)
        self._graphs = DecodeGraphs(
            self._decode_forward,
            self._empty_inputs,
            self._metrics,
            sizes=batch_sizes(max_batch_size),
            capture=capture,
        )
        with torch.inference_mode():
            self._graphs.record()
            # Recording wrote to the page of nobody, which stays zero.
            for tensor in (*self._kv.keys, *self._kv.values):
                tensor[self._kv.null_page].zero_()
        self._metrics.now.graph_bytes = max(0, _reserved_bytes(self._device) - before)

    @torch.inference_mode()
    def compile_decodes(self, split_counts: Iterable[int]) -> None:
        """Run the decode once for each number of splits, so that no request waits for a compiler.

        The table is two pages wide: with one, a compiler may take its stride for a constant.
        """
        shape = self._kv.shape
        heads = int(self._model.config.get_text_config().num_attention_heads)
        query = torch.zeros(1, heads, shape.head_dim, dtype=shape.dtype, device=self._device)
        table = torch.full((1, 2), self._kv.null_page, dtype=torch.int32, device=self._device)
        length = torch.ones(1, dtype=torch.int32, device=self._device)
        for count in split_counts:
            self._decode(
                query,
                self._kv.keys[0],
                self._kv.values[0],
                table,
                length,
                scale=1.0,
                num_splits=count,
            )

    def _forward(
        self,
        ordered: list[Chunk],
        decodes: list[Chunk],
        prefills: list[Chunk],
        starts: list[int],
        rows: list[int],
    ) -> Tensor:
        """Logits [len(rows), V] in FP32 (of one row where none is read)."""
        inputs, prompts, extra = self._upload(ordered, decodes, prefills, rows)
        if self._graphs is not None and decodes:
            if prefills:
                self._graphs.count_miss("prompts in the step")
            elif rows != list(range(len(decodes))):
                self._graphs.count_miss("not every row is read")
            else:
                with self.clock:
                    logits = self._graphs.run(inputs)
                if logits is not None:
                    return logits.float()
        batch = None
        if decodes:
            longest = max(chunk.start for chunk in decodes) + 1
            batch = DecodeBatch(
                inputs.table_BP, inputs.length_B, self._num_splits(len(decodes), longest)
            )
        step = CudaStep(self._kv, inputs.slot_rows, self._decode, batch, prompts)
        with self.clock:
            return self._logits(inputs.ids_B, inputs.position_B, step, extra)

    def _logits(self, ids: Tensor, positions: Tensor, step: CudaStep, rows: Tensor | int) -> Tensor:
        output = self._model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
            quantgate_step=step,
        )
        logits: Tensor = output.logits[0].float()
        return logits

    def _decode_forward(self, inputs: DecodeInputs) -> Tensor:
        """A decode step of fixed shapes, whatever the lengths: what a graph records."""
        batch = len(inputs.ids_B)
        longest = inputs.table_BP.shape[1] * self._kv.page_size
        decodes = DecodeBatch(inputs.table_BP, inputs.length_B, self._num_splits(batch, longest))
        step = CudaStep(self._kv, inputs.slot_rows, self._decode, decodes, None)
        # 0 keeps every row. One buffer for all recorded sizes: each would keep its own otherwise.
        logits = self._logits(inputs.ids_B, inputs.position_B, step, 0)
        if self._graph_logits is None or len(self._graph_logits) < batch:
            self._graph_logits = torch.empty_like(logits)
        return self._graph_logits[:batch].copy_(logits)

    def _upload(
        self, ordered: list[Chunk], decodes: list[Chunk], prefills: list[Chunk], rows: list[int]
    ) -> tuple[DecodeInputs, PackedPrompts | None, Tensor]:
        """The step's inputs on the device, with one copy."""
        size = self._kv.page_size
        ids = [
            token
            for chunk in ordered
            for token in chunk.request.token_ids[chunk.start : chunk.start + chunk.length]
        ]
        positions = np.concatenate(
            [np.arange(chunk.start, chunk.start + chunk.length) for chunk in ordered]
        )
        pages = np.concatenate([_pages(c, c.start, c.start + c.length, size) for c in ordered])
        width = max((chunk.start // size + 1 for chunk in decodes), default=0)
        table = np.zeros((len(decodes), width), dtype=np.int32)
        for row, chunk in enumerate(decodes):
            held = chunk.request.pages[: chunk.start // size + 1]
            table[row, : len(held)] = held
        lengths = np.array([chunk.start + 1 for chunk in decodes], dtype=np.int32)
        spans = [(chunk.length, chunk.start + chunk.length) for chunk in prefills]
        ends_q = np.cumsum([0, *(new for new, _ in spans)])
        ends_l = np.cumsum([0, *(total for _, total in spans)])
        earlier: list[NDArray[np.int64]] = []
        if any(new != total for new, total in spans):
            earlier = [
                np.concatenate([_pages(c, 0, c.start + c.length, size) for c in prefills]),
                np.concatenate([np.arange(total) % size for _, total in spans]),
            ]
        arrays = [
            np.asarray(ids), positions, pages, positions % size, table, lengths, ends_q, ends_l,
            np.asarray(rows or [0]), *earlier,
        ]  # fmt: skip
        tensors = self._staging.upload(arrays)
        ids_t, position_t, page_t, offset_t, table_t, length_t, ends_q_t, ends_l_t = tensors[:8]
        inputs = DecodeInputs(
            ids_t, position_t, self._slot_rows(page_t, offset_t), table_t, length_t
        )
        prompts = None
        if prefills:
            prompts = PackedPrompts(
                ends_q_t,
                ends_l_t,
                tuple(spans),
                tensors[9].long() if earlier else None,
                tensors[10].long() if earlier else None,
            )
        return inputs, prompts, tensors[8].long()

    def _slot_rows(self, pages: Tensor, offsets: Tensor) -> Tensor:
        """[T * K]: where each head's part of each token lies in the storage."""
        first = pages.long() * len(self._head_rows)
        rows = (first.unsqueeze(1) + self._head_rows) * self._kv.page_size
        return (rows + offsets.unsqueeze(1)).view(-1)

    def _empty_inputs(self, batch: int) -> DecodeInputs:
        """A decode step of one-token sequences on the page of nobody."""
        device = self._device
        null = self._kv.null_page
        pages = torch.full((batch,), null, dtype=torch.int32, device=device)
        zeros = torch.zeros(batch, dtype=torch.int32, device=device)
        return DecodeInputs(
            zeros.clone(),
            zeros.clone(),
            self._slot_rows(pages, zeros),
            torch.full((batch, self._max_pages), null, dtype=torch.int32, device=device),
            torch.ones(batch, dtype=torch.int32, device=device),
        )


def _pages(chunk: Chunk, first: int, end: int, size: int) -> NDArray[np.int64]:
    """The page of each token `first` to `end` of a chunk's request."""
    held: NDArray[np.int64] = np.asarray(chunk.request.pages, dtype=np.int64)
    return held.take(np.arange(first, end) // size)


def _reserved_bytes(device: torch.device) -> int:
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0
