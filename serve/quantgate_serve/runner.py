"""Turns a plan into tensors, runs the model, and reads tokens out of the logits.

All chunks of a step lie one after another in a single row [1, T]; positions and the step's facts
keep them apart. Logits are computed only where a token or a log-probability is read.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from quantgate_serve.attention import native_paged, torch_step
from quantgate_serve.attention.in_place import can_read_in_place
from quantgate_serve.attention.interface import AttentionStep
from quantgate_serve.attention.native_paged import NativeStep
from quantgate_serve.constraints import Constraints
from quantgate_serve.decoder import as_decoder
from quantgate_serve.finite import all_finite, check_finite
from quantgate_serve.hidden_states import HiddenStates
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.loading import LoadedModel
from quantgate_serve.model_clock import ModelClock
from quantgate_serve.native.layer import LayerKernels, can_attend
from quantgate_serve.page_tables import PageTables
from quantgate_serve.readout import ChunkResult, Readout, plan_readout
from quantgate_serve.scheduler import Chunk
from quantgate_serve.staging import Arrive, download
from quantgate_serve.step_inputs import StepInputs, build_inputs

# Waits for a step that was launched, and gives what it gave.
Collect = Callable[[], list[ChunkResult]]


class Runner:
    """Computes steps. Between them it keeps the KV storage, and the page tables of sequences."""

    # Whether launch() comes back while the step is computed, so that there is time to use.
    overlaps = False

    def __init__(
        self, loaded: LoadedModel, kv: KVStorage, *, kernels: LayerKernels | None = None
    ) -> None:
        """With `kernels` attention is theirs, where they are written for this model's cache."""
        self._decoder = as_decoder(loaded.model)
        self._num_heads = int(loaded.model.config.get_text_config().num_attention_heads)
        self._kernels = kernels if can_attend(kv, self._num_heads) else None
        self._reads_in_place = can_read_in_place(kv)
        self._device = loaded.device
        self._kv = kv
        self.clock = ModelClock(loaded.device)
        width = min(kv.num_pages, -(-loaded.context_length // kv.page_size))
        self._tables = PageTables(width=width, null_page=kv.null_page)
        self._constraints = Constraints(
            loaded.tokenizer, vocab_size=loaded.vocab_size, eos_ids=loaded.eos_ids
        )
        self._hidden_states = HiddenStates(loaded.model.get_output_embeddings())
        self.padded_pages = 0
        self.used_pages = 0

    def run(self, plan: Sequence[Chunk]) -> list[ChunkResult]:
        """Compute `plan`. Raises what launch() and its result raise."""
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: Sequence[Chunk]) -> Collect:
        """Begin to compute `plan`; what is returned waits for it, and is to be called once.

        Writing a chunk twice is harmless, so a step that failed can be tried again.

        Raises:
            NonFiniteLogitsError: by what is returned, of one of the requests at least.
            GrammarError: a request's grammar is too complex to follow.
        """
        chunks, num_decodes = order(plan)
        readout = plan_readout(chunks)
        self._hidden_states.expect(len(readout.embedded))
        logits = self._forward(readout, num_decodes)
        hidden = self._hidden_states.take() if readout.embedded else None
        arrive = self._send(readout, logits, hidden)
        return lambda: self._collect(readout, logits, hidden, arrive)

    def foresee(self, plan: Sequence[Chunk]) -> None:
        """Told between launch() and its result that `plan` is likely to come next."""

    def erase(self, pages: Sequence[int]) -> None:
        """Forget what `pages` hold: their next owner reads the slots that it has not written."""
        self._kv.erase(pages)

    def _send(self, readout: Readout, logits: Tensor, hidden: Tensor | None) -> Arrive:
        """Choose the tokens, and send them to the host."""
        tokens = self._choose(readout, logits)
        finite = all_finite(logits)
        if hidden is not None:
            finite = finite & all_finite(hidden)
        return download(tokens, finite)

    def _choose(self, readout: Readout, logits: Tensor) -> Tensor:
        return readout.choose(logits, self._constraints)

    @torch.inference_mode()
    def _collect(
        self, readout: Readout, logits: Tensor, hidden: Tensor | None, arrive: Arrive
    ) -> list[ChunkResult]:
        tokens, is_finite = arrive()
        check_finite(is_finite)
        results = readout.results(logits, tokens)
        if hidden is not None:
            _add_hidden_sums(results, hidden)
        return results

    def _forward(self, readout: Readout, num_decodes: int) -> Tensor:
        """Logits [R, V] in FP32 of the rows to read (of one where none is)."""
        inputs = build_inputs(
            readout.chunks, self._tables, num_decodes=num_decodes, page_size=self._kv.page_size
        )
        if self._kernels is None:
            step: AttentionStep | NativeStep = self._torch_step(inputs, readout)
        else:
            step = native_paged.build_step(
                self._kernels,
                self._kv,
                inputs,
                group=self._num_heads // self._kv.shape.num_kv_heads,
            )
            self._count_pages(readout.chunks[:num_decodes], None)
        rows = rows_to_compute(readout)
        input_ids = torch.from_numpy(inputs.ids).to(self._device)
        position_ids = torch.from_numpy(inputs.positions).to(self._device)
        rows_to_read = torch.tensor(rows).to(self._device)
        with self.clock:
            logits: Tensor = self._decoder(input_ids, position_ids, step, rows_to_read)
        return logits.float()

    def _torch_step(self, inputs: StepInputs, readout: Readout) -> AttentionStep:
        step = torch_step.build_step(
            self._kv, inputs, num_heads=self._num_heads, reads_in_place=self._reads_in_place
        )
        gathered = sum(len(group.page_rows) for group in step.decodes)
        decodes = readout.chunks[: inputs.num_decodes]
        self._count_pages(decodes, gathered // self._kv.shape.num_kv_heads)
        return step

    def _count_pages(self, decodes: Sequence[Chunk], gathered: int | None) -> None:
        """Count the pages that `decodes` need, and those that are read for them (None: these)."""
        size = self._kv.page_size
        needed = sum([chunk.start // size for chunk in decodes]) + len(decodes)
        self.used_pages += needed
        self.padded_pages += needed if gathered is None else gathered


def order(plan: Sequence[Chunk]) -> tuple[list[Chunk], int]:
    """The chunks of `plan` as they lie in a step: decodes by their length, then the others; and how
    many decode."""
    decodes: list[Chunk] = []
    others: list[Chunk] = []
    for chunk in plan:
        # One that embeds never decodes: all that a recorded step reads goes through the head.
        if chunk.length == 1 and chunk.start > 0 and not chunk.request.params.embeds:
            decodes.append(chunk)
        else:
            others.append(chunk)
    decodes.sort(key=attrgetter("start"))
    return decodes + others, len(decodes)


def rows_to_compute(readout: Readout) -> list[int]:
    """Whose hidden states are needed: what the head reads, and behind it what is embedded."""
    # The head is never without a row.
    return (readout.rows or [0]) + readout.embedded


def _add_hidden_sums(results: list[ChunkResult], hidden: Tensor) -> None:
    """Add up the hidden states [N, H] of those that embed, which lie one after another."""
    first = 0
    for result in results:
        if result.chunk.request.params.embeds:
            end = first + result.chunk.length
            result.hidden_sum = hidden[first:end].sum(dim=0).cpu().numpy()
            first = end
