"""Steps of a model that native/decoder.py computes: few and small calls between its calls.

A step reads all weights, which pushes everything else out of the caches. So what the host does
between two of them waits for memory, the code of each library call included: a call of torch takes
up to 70 us there that takes 5 in a loop. Hence lists of integers, and one call for the rest.
"""

from array import array
from collections.abc import Sequence

from torch import Tensor

from quantgate_serve.finite import all_finite, check_finite
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.loading import LoadedModel
from quantgate_serve.native.angles import Integers
from quantgate_serve.native.decoder import Computed, NativeDecoder
from quantgate_serve.readout import ChunkResult, Readout
from quantgate_serve.runner import Collect, Runner, order, rows_to_compute
from quantgate_serve.scheduler import Chunk
from quantgate_serve.staging import Arrive


class NativeRunner(Runner):
    """Computes steps on a CPU, from ids to tokens in one call wherever those are greedy."""

    def __init__(self, loaded: LoadedModel, kv: KVStorage, decoder: NativeDecoder) -> None:
        """`decoder` is the model of `loaded`."""
        super().__init__(loaded, kv)
        self._native = decoder
        # Of the last step that was more than tokens.
        self._computed: Computed | None = None
        self._logits: Tensor | None = None

    def launch(self, plan: Sequence[Chunk]) -> Collect:
        """As Runner.launch(), but computed at once; without torch where only tokens are asked."""
        if not all(chunk.request.params.is_plain for chunk in plan):
            return super().launch(plan)
        chunks, num_decodes = order(plan)
        rows = array("q")
        end = 0
        for chunk in chunks:
            end += chunk.length
            if chunk.start + chunk.length == len(chunk.request.token_ids):
                rows.append(end - 1)
        self._hidden_states.expect(0)
        computed = self._compute(chunks, num_decodes, rows or array("q", [0]))
        return lambda: _results(chunks, len(rows), computed)

    def _forward(self, readout: Readout, num_decodes: int) -> Tensor:
        rows = array("q", rows_to_compute(readout))
        self._computed = self._compute(readout.chunks, num_decodes, rows)
        self._logits = self._computed.logits
        return self._logits

    def _compute(self, chunks: Sequence[Chunk], num_decodes: int, rows: Integers) -> Computed:
        indices = self._tables.indices_of([chunk.request for chunk in chunks])
        ids, described = array("q"), array("q")
        for chunk, index in zip(chunks, indices, strict=True):
            start, length = chunk.start, chunk.length
            known = chunk.request.token_ids
            if length == 1:
                ids.append(known[start])
            else:
                ids.extend(known[start : start + length])
            described.extend((index, start, length))
        self._count_pages(chunks[:num_decodes], None)
        with self.clock:
            return self._native.compute(self._kv, ids, described, self._tables.pages, rows)

    def _send(self, readout: Readout, logits: Tensor, hidden: Tensor | None) -> Arrive:
        computed = self._computed
        # Another `logits` where somebody stands between the two, as a test may.
        if computed is None or self._logits is not logits:
            return super()._send(readout, logits, hidden)
        is_finite = computed.is_finite and (hidden is None or bool(all_finite(hidden)))
        best = computed.best
        if all(r.params.is_greedy and r.params.grammar is None for r in readout.sampled):
            tokens = [best[row] for row in readout.sampled_at]
        else:
            tokens = self._choose(readout, logits).tolist()
        return lambda: (tokens, is_finite)


def _results(chunks: Sequence[Chunk], num_sampled: int, computed: Computed) -> list[ChunkResult]:
    """The best token for each of the chunks that ends its sequence, `num_sampled` of them."""
    check_finite(computed.is_finite)
    if num_sampled == len(chunks):
        return [ChunkResult(chunk, t) for chunk, t in zip(chunks, computed.best, strict=True)]
    tokens = iter(computed.best)
    return [ChunkResult(chunk, next(tokens) if chunk.is_last else None) for chunk in chunks]
