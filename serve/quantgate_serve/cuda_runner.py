"""The runner's forward on CUDA: inputs in one copy, Triton decode, varlen prompts, decode graphs.

While a step is computed, the inputs of the decodes that follow it travel to the device, where its
tokens are put between them: the host only looks whether they are the ones that did follow.

Runs on any device (the tests run it on the CPU with the plain-torch decode), so that only the
kernels, the pinned copies and the recording itself need a GPU to be tried.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
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
from quantgate_serve.readout import Readout
from quantgate_serve.runner import Runner
from quantgate_serve.scheduler import Chunk
from quantgate_serve.staging import Integers, Staging
from quantgate_serve.step_inputs import build_inputs

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Foreseen:
    """The decodes that were foreseen, by request and start, as rows of `inputs`.

    Each with the list that its pages were read from: one that was interrupted has another.
    """

    rows: dict[tuple[int, int], tuple[int, list[int]]]
    inputs: DecodeInputs


class CudaRunner(Runner):
    """Computes steps on CUDA."""

    overlaps = True

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
        # What the step under way will give: whose tokens, and the tokens.
        self._chosen: tuple[Readout, Tensor] | None = None
        self._foreseen: _Foreseen | None = None
        # Steps whose decodes were foreseen, all of them or more, and those that were built.
        self.num_foreseen = 0
        self.num_built = 0

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

    @torch.inference_mode()
    def foresee(self, plan: Sequence[Chunk]) -> None:
        """Send the inputs of the decodes `plan`, which follow the step that was launched last.

        Their tokens are among those that it will choose, and get there without the host.
        """
        if not plan or self._chosen is None:
            return
        plan = sorted(plan, key=attrgetter("start"))  # as order() has them, but for ties
        readout, tokens = self._chosen
        place = {request.id: index for index, request in enumerate(readout.sampled)}
        requests = [chunk.request for chunk in plan]
        sources = np.array([place[request.id] for request in requests])
        starts = np.array([chunk.start for chunk in plan])
        packed = self._pack(self._tables.rows_of(requests), starts, np.zeros_like(starts))
        rows_BW, source_B = self._staging.send_ahead([packed, sources])
        # In the stream's order: after the step that chooses them, before the one that reads them.
        rows_BW[:, 0] = tokens.index_select(0, source_B)
        self._foreseen = _Foreseen(
            {
                (chunk.request.id, chunk.start): (row, chunk.request.pages)
                for row, chunk in enumerate(plan)
            },
            DecodeInputs(rows_BW),
        )

    def _choose(self, readout: Readout, logits: Tensor) -> Tensor:
        tokens = super()._choose(readout, logits)
        self._chosen = readout, tokens
        return tokens

    def _forward(self, readout: Readout, num_decodes: int) -> Tensor:
        """Logits [R, V] in FP32 of the rows to read (of one where none is)."""
        decodes, prompts = readout.chunks[:num_decodes], readout.chunks[num_decodes:]
        inputs, packed, rows = self._upload(readout, decodes, prompts)
        if self._graphs is not None and inputs is not None:
            if packed is not None:
                self._graphs.count_miss("prompts in the step")
            elif not readout.reads_every_token:
                self._graphs.count_miss("not every row is read")
            else:
                with self.clock:
                    logits = self._graphs.run(inputs)
                if logits is not None:
                    return logits.float()
        batch = None
        if inputs is not None:
            longest = max(chunk.start for chunk in decodes) + 1
            batch = self._decode_batch(inputs, self._num_splits(len(decodes), longest))
        ids, positions, slots = self._tokens(inputs, packed)
        packed_prompts = None if packed is None else packed.prompts
        step = CudaStep(self._kv, self._slot_rows(slots), self._decode, batch, packed_prompts)
        with self.clock:
            return self._logits(ids, positions, step, rows)

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
        batch = len(inputs)
        longest = inputs.table_BP.shape[1] * self._kv.page_size
        decodes = self._decode_batch(inputs, self._num_splits(batch, longest))
        ids, positions, slots = self._tokens(inputs, None)
        step = CudaStep(self._kv, self._slot_rows(slots), self._decode, decodes, None)
        # 0 keeps every row. One buffer for all recorded sizes: each would keep its own otherwise.
        logits = self._logits(ids, positions, step, 0)
        if self._graph_logits is None or len(self._graph_logits) < batch:
            self._graph_logits = torch.empty_like(logits)
        return self._graph_logits[:batch].copy_(logits)

    def _decode_batch(self, inputs: DecodeInputs, num_splits: int) -> DecodeBatch:
        return DecodeBatch(inputs.table_BP, inputs.position_B + 1, num_splits)

    def _upload(
        self, readout: Readout, decodes: Sequence[Chunk], prompts: Sequence[Chunk]
    ) -> tuple[DecodeInputs | None, "_Packed | None", Tensor | int]:
        """The inputs of decodes, of prompts, and the rows to read: on the device with one copy."""
        arrays: dict[str, Integers] = {}
        inputs, kept = self._recall(decodes)
        if decodes and inputs is None:
            starts = np.array([chunk.start for chunk in decodes])
            ids = np.array([chunk.request.token_ids[chunk.start] for chunk in decodes])
            rows = self._tables.rows_of([chunk.request for chunk in decodes])
            arrays["decodes"] = self._pack(rows, starts, ids)
        elif inputs is not None and kept != list(range(len(inputs))):
            arrays["kept"] = np.array(kept)
        if prompts:
            arrays |= self._pack_prompts(prompts)
        if not readout.reads_every_token:
            arrays["rows"] = np.array((readout.rows or [0]) + readout.embedded)
        sent: dict[str, Tensor] = {}
        if arrays:
            sent = dict(zip(arrays, self._staging.upload([*arrays.values()]), strict=True))
        if "decodes" in sent:
            inputs = DecodeInputs(sent["decodes"])
        elif inputs is not None and "kept" in sent:
            inputs = DecodeInputs(inputs.rows_BW.index_select(0, sent["kept"]))
        packed = None
        if prompts:
            held = sent.get("held")
            lengths = tuple((c.length, c.start + c.length) for c in prompts)
            packed = _Packed(
                sent["tokens"],
                PackedPrompts(
                    sent["ends_q"],
                    sent["ends_l"],
                    lengths,
                    None if held is None else held.long() // self._kv.page_size,
                    None if held is None else held.long() % self._kv.page_size,
                ),
            )
        # 0 keeps every row.
        return inputs, packed, sent["rows"].long() if "rows" in sent else 0

    def _recall(self, decodes: Sequence[Chunk]) -> tuple[DecodeInputs | None, list[int]]:
        """The inputs that were sent ahead, and which of their rows `decodes` are, in order.

        Those that have ended since are left out. None if any of `decodes` was not foreseen.
        """
        foreseen, self._foreseen = self._foreseen, None
        kept: list[int] = []
        for chunk in decodes:
            found = foreseen and foreseen.rows.get((chunk.request.id, chunk.start))
            if not found or found[1] is not chunk.request.pages:
                self.num_built += 1
                return None, []
            kept.append(found[0])
        if foreseen is None or not kept:
            return None, []
        self.num_foreseen += 1
        return foreseen.inputs, kept

    def _pack(self, rows: Integers, starts: Integers, ids: Integers) -> Integers:
        """[B, 2 + P]: the rows of DecodeInputs."""
        width = int(starts.max()) // self._kv.page_size + 1
        packed = np.empty((len(rows), 2 + width), dtype=np.int32)
        packed[:, 0], packed[:, 1] = ids, starts
        packed[:, 2:] = self._tables.pages[rows, :width]
        return packed

    def _pack_prompts(self, prompts: Sequence[Chunk]) -> dict[str, Integers]:
        size = self._kv.page_size
        inputs = build_inputs(prompts, self._tables, num_decodes=0, page_size=size)
        totals = inputs.starts + inputs.lengths
        arrays: dict[str, Integers] = {
            "tokens": np.stack([inputs.ids, inputs.positions, inputs.slots]),
            "ends_q": np.concatenate([[0], inputs.lengths.cumsum()]),
            "ends_l": np.concatenate([[0], totals.cumsum()]),
        }
        if inputs.starts.any():
            pages = [
                inputs.table[row, np.arange(total) // size] * size + np.arange(total) % size
                for row, total in zip(inputs.rows, totals, strict=True)
            ]
            arrays["held"] = np.concatenate(pages)
        return arrays

    def _tokens(
        self, inputs: DecodeInputs | None, packed: "_Packed | None"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, positions and slots [T] of a step, decodes first."""
        if inputs is None:
            if packed is None:
                raise ValueError("a step has tokens")
            ids, positions, slots = packed.tokens
            return ids, positions, slots
        size = self._kv.page_size
        at = inputs.position_B
        pages = inputs.table_BP.gather(1, (at // size).long().unsqueeze(1)).squeeze(1)
        mine = (inputs.ids_B, at, pages * size + at % size)
        if packed is None:
            return mine
        ids, positions, slots = (torch.cat(pair) for pair in zip(mine, packed.tokens, strict=True))
        return ids, positions, slots

    def _slot_rows(self, slots: Tensor) -> Tensor:
        """[T * K]: where each head's part of each token lies in the storage."""
        size = self._kv.page_size
        first = slots.long() // size * len(self._head_rows)
        rows = (first.unsqueeze(1) + self._head_rows) * size
        return (rows + (slots % size).unsqueeze(1)).view(-1)

    def _empty_inputs(self, batch: int) -> DecodeInputs:
        """A decode step of one-token sequences on the page of nobody."""
        rows = torch.full(
            (batch, 2 + self._max_pages), self._kv.null_page, dtype=torch.int32, device=self._device
        )
        rows[:, :2] = 0
        return DecodeInputs(rows)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Prompts of a step: ids, positions and slots [3, Q] of their tokens, and where they end."""

    tokens: Tensor
    prompts: PackedPrompts


def _reserved_bytes(device: torch.device) -> int:
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0
