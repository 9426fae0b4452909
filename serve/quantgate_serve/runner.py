"""Turns a plan into tensors, runs the model, and reads tokens out of the logits.

All chunks of a step lie one after another in a single row [1, T]; positions and the step's facts
keep them apart. Logits are computed only where a token or a log-probability is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantgate_serve import sampling
from quantgate_serve.attention.in_place import build_lookup, can_read_in_place
from quantgate_serve.attention.interface import AttentionStep, DecodeGroup, PrefillSpan
from quantgate_serve.attention.native_paged import NativeStep, build_step
from quantgate_serve.constraints import Constraints
from quantgate_serve.decoder import as_decoder
from quantgate_serve.finite import check_finite
from quantgate_serve.hidden_states import HiddenStates
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.loading import LoadedModel
from quantgate_serve.model_clock import ModelClock
from quantgate_serve.native.library import LayerKernels, can_attend
from quantgate_serve.request import Request, TokenLogprob
from quantgate_serve.scheduler import Chunk

# A group of decodes is split where padding would read this many times the pages it needs.
_MAX_PADDING = 1.6
_MIN_GROUP = 8

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What a chunk gave: the next token if it ended its sequence, and what was asked along."""

    chunk: Chunk
    token_id: int | None
    logprob: TokenLogprob | None
    prompt_logprobs: list[TokenLogprob]
    # [H]: the last hidden states of its tokens, added up, for a request that embeds.
    hidden_sum: NDArray[np.float32] | None = None


class Runner:
    """Computes steps. Keeps no state between them but the KV storage."""

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
        self._heads = torch.arange(kv.shape.num_kv_heads)
        self._constraints = Constraints(
            loaded.tokenizer, vocab_size=loaded.vocab_size, eos_ids=loaded.eos_ids
        )
        self._hidden_states = HiddenStates(loaded.model.get_output_embeddings())
        self.padded_pages = 0
        self.used_pages = 0

    @torch.inference_mode()
    def run(self, plan: Sequence[Chunk]) -> list[ChunkResult]:
        """Compute `plan`. Writing a chunk twice is harmless, so a failed step can be retried.

        Raises:
            NonFiniteLogitsError: of one of the requests at least.
        """
        decodes = sorted(
            (chunk for chunk in plan if _is_decode(chunk)), key=lambda chunk: chunk.start
        )
        prefills = [chunk for chunk in plan if not _is_decode(chunk)]
        ordered = decodes + prefills
        starts, rows = _rows_to_read(ordered)
        embedded = _rows_to_embed(ordered, starts)
        self._hidden_states.expect(len(embedded))
        if embedded:
            # The head is never without a row.
            rows = (rows or [0]) + embedded
        logits = self._forward(ordered, decodes, prefills, starts, rows)
        check_finite(logits)
        results = self._read(ordered, logits)
        return self._add_hidden_sums(results) if embedded else results

    def erase(self, pages: Sequence[int]) -> None:
        """Forget what `pages` hold: their next owner reads the slots that it has not written."""
        self._kv.erase(pages)

    def _add_hidden_sums(self, results: list[ChunkResult]) -> list[ChunkResult]:
        """`results` with the hidden states of those that embed, which lie one after another."""
        hidden = self._hidden_states.take()
        check_finite(hidden)
        first, found = 0, []
        for result in results:
            if result.chunk.request.params.embeds:
                end = first + result.chunk.length
                result = replace(result, hidden_sum=hidden[first:end].sum(dim=0).cpu().numpy())
                first = end
            found.append(result)
        return found

    def _forward(
        self,
        ordered: list[Chunk],
        decodes: list[Chunk],
        prefills: list[Chunk],
        starts: list[int],
        rows: list[int],
    ) -> Tensor:
        """Logits [len(rows), V] in FP32 (of one row where none is read)."""
        ids = [
            token
            for chunk in ordered
            for token in chunk.request.token_ids[chunk.start : chunk.start + chunk.length]
        ]
        positions = np.concatenate(
            [
                np.fromiter((chunk.start for chunk in decodes), np.int64, len(decodes)),
                *(np.arange(chunk.start, chunk.start + chunk.length) for chunk in prefills),
            ]
        )
        if self._kernels is None:
            step: AttentionStep | NativeStep = self._attention_step(
                decodes, prefills, starts, positions
            )
        else:
            step = self._native_step(self._kernels, ordered)
        input_ids = self._to_device(torch.tensor(ids))
        position_ids = self._to_device(torch.from_numpy(positions))
        rows_to_read = self._to_device(torch.tensor(rows or [0]))
        with self.clock:
            logits: Tensor = self._decoder(input_ids, position_ids, step, rows_to_read)
        return logits.float()

    def _native_step(self, kernels: LayerKernels, ordered: list[Chunk]) -> NativeStep:
        step = build_step(
            kernels,
            self._kv,
            [chunk.request.pages for chunk in ordered],
            [chunk.start for chunk in ordered],
            [chunk.length for chunk in ordered],
            group=self._num_heads // self._kv.shape.num_kv_heads,
        )
        needed = sum(c.start // self._kv.page_size + 1 for c in ordered if _is_decode(c))
        self.padded_pages += needed
        self.used_pages += needed
        return step

    def _attention_step(
        self, decodes: list[Chunk], prefills: list[Chunk], starts: list[int], positions: Positions
    ) -> AttentionStep:
        size = self._kv.page_size
        page_counts = [chunk.start // size + 1 for chunk in decodes]
        pages = np.fromiter((c.request.pages[c.start // size] for c in decodes), np.int64)
        chunk_pages = [np.asarray(chunk.request.pages, dtype=np.int64) for chunk in prefills]
        spans = []
        token_pages = [pages]
        for chunk, held, start in zip(prefills, chunk_pages, starts[len(decodes) :], strict=True):
            at = positions[start : start + chunk.length]
            token_pages.append(held[at // size])
            spans.append(self._span(chunk, held, at, start))
        slot_rows = self._rows_of(np.concatenate(token_pages)) * size
        slot_rows += torch.from_numpy(positions % size).unsqueeze(1)
        return AttentionStep(
            kv=self._kv,
            slot_rows=self._to_device(slot_rows.reshape(-1)),
            decodes=tuple(
                self._group(decodes[first:end], first, page_counts[end - 1])
                for first, end in split_by_length(page_counts)
            ),
            prefills=tuple(spans),
        )

    def _group(self, decodes: list[Chunk], start: int, num_pages: int) -> DecodeGroup:
        table = np.full((len(decodes), num_pages), self._kv.null_page, dtype=np.int64)
        lengths = np.empty(len(decodes), dtype=np.int64)
        for row, chunk in enumerate(decodes):
            held = chunk.request.pages[:num_pages]
            table[row, : len(held)] = held
            lengths[row] = chunk.start + 1
        num_slots = num_pages * self._kv.page_size
        self.padded_pages += table.size
        self.used_pages += int(lengths.sum()) // self._kv.page_size
        heads = len(self._heads)
        # [B, K, P]: for each sequence and head the rows of its pages.
        rows = (torch.from_numpy(table) * heads).unsqueeze(1) + self._heads.view(1, -1, 1)
        is_padding = np.arange(num_slots) >= lengths[:, None]
        bias = torch.zeros(is_padding.shape, dtype=self._kv.shape.dtype)
        bias.masked_fill_(torch.from_numpy(is_padding), float("-inf"))
        lookup = None
        if self._reads_in_place:
            lookup = build_lookup(self._kv, rows, num_heads=self._num_heads)
        return DecodeGroup(
            start=start,
            count=len(decodes),
            page_rows=self._to_device(rows.reshape(-1)),
            bias=self._to_device(bias.repeat_interleave(heads, dim=0).unsqueeze(1)),
            lookup=lookup,
        )

    def _span(self, chunk: Chunk, held: Positions, at: Positions, start: int) -> PrefillSpan:
        if chunk.start == 0:
            return PrefillSpan(start, chunk.length, None, None)
        num_pages = -(-(chunk.start + chunk.length) // self._kv.page_size)
        rows = self._rows_of(held[:num_pages]).t().reshape(-1)  # head by head
        mask = np.arange(num_pages * self._kv.page_size) <= at[:, None]
        return PrefillSpan(
            start,
            chunk.length,
            self._to_device(rows),
            self._to_device(torch.from_numpy(mask)),
        )

    def _rows_of(self, pages: Positions) -> Tensor:
        """[n, K]: where each head's part of each page lies in the storage."""
        return (torch.from_numpy(pages) * len(self._heads)).unsqueeze(1) + self._heads

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if self._device.type == "cpu" else tensor.to(self._device)

    def _read(self, ordered: list[Chunk], logits: Tensor) -> list[ChunkResult]:
        prompts: list[list[TokenLogprob]] = []
        sampled: list[Request] = []
        sampled_rows: list[int] = []
        row = 0
        for chunk in ordered:
            targets = _prompt_targets(chunk)
            last = row + len(targets)
            prompts.append(_read_prompt(chunk, targets, logits[row:last]) if targets else [])
            row = last
            if _is_sampled(chunk):
                sampled.append(chunk.request)
                sampled_rows.append(row)
                row += 1
        if not sampled:
            return [
                ChunkResult(chunk, None, None, prompt)
                for chunk, prompt in zip(ordered, prompts, strict=True)
            ]
        if len(sampled) != logits.shape[0]:
            logits = logits[sampled_rows]
        tokens = sampling.choose_tokens(
            self._constraints.mask(logits, sampled),
            [r.params for r in sampled],
            [r.num_output for r in sampled],
        )
        logprobs = _read_logprobs(logits, tokens, sampled)
        chosen = iter(zip(tokens, logprobs, strict=True))
        results = []
        for chunk, prompt in zip(ordered, prompts, strict=True):
            token, logprob = next(chosen) if _is_sampled(chunk) else (None, None)
            results.append(ChunkResult(chunk, token, logprob, prompt))
        return results


def split_by_length(page_counts: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of the ascending `page_counts` to gather together, so that padding stays small."""
    count = len(page_counts)
    if count == 0:
        return []
    pages = np.asarray(page_counts)
    if count >= 2 * _MIN_GROUP and count * pages[-1] > _MAX_PADDING * pages.sum():
        sizes = np.arange(_MIN_GROUP, count - _MIN_GROUP + 1)
        cost = sizes * pages[sizes - 1] + (count - sizes) * pages[-1]
        middle = int(sizes[cost.argmin()])
        upper = split_by_length(page_counts[middle:])
        return split_by_length(page_counts[:middle]) + [
            (first + middle, end + middle) for first, end in upper
        ]
    return [(0, count)]


def _rows_to_read(ordered: list[Chunk]) -> tuple[list[int], list[int]]:
    """Where each chunk starts in the step, and the rows of the step whose logits are read."""
    starts, rows = [], []
    row = 0
    for chunk in ordered:
        starts.append(row)
        rows += [row + target - 1 - chunk.start for target in _prompt_targets(chunk)]
        row += chunk.length
        if _is_sampled(chunk):
            rows.append(row - 1)
    return starts, rows


def _rows_to_embed(ordered: list[Chunk], starts: list[int]) -> list[int]:
    return [
        row
        for chunk, start in zip(ordered, starts, strict=True)
        if chunk.request.params.embeds
        for row in range(start, start + chunk.length)
    ]


def _is_decode(chunk: Chunk) -> bool:
    """One that embeds never is: all that a recorded decode step reads goes through the head."""
    return chunk.length == 1 and chunk.start > 0 and not chunk.request.params.embeds


def _is_sampled(chunk: Chunk) -> bool:
    return chunk.is_last and chunk.request.params.max_tokens > 0


def _prompt_targets(chunk: Chunk) -> range:
    """Positions of prompt tokens whose log-probability this chunk gives for the first time."""
    request = chunk.request
    if not request.params.prompt_logprobs:
        return range(0)
    first = max(chunk.start + 1, len(request.prompt_logprobs) + 1)
    return range(first, max(first, min(chunk.start + chunk.length + 1, request.num_prompt)))


def _read_prompt(chunk: Chunk, targets: range, logits: Tensor) -> list[TokenLogprob]:
    num_top = chunk.request.params.num_logprobs or 0
    return sampling.token_logprobs(
        logits,
        [chunk.request.prompt_ids[target] for target in targets],
        num_top=[num_top] * len(targets),
        wanted_ids=[()] * len(targets),
    )


def _read_logprobs(
    logits: Tensor, tokens: list[int], requests: list[Request]
) -> list[TokenLogprob | None]:
    result: list[TokenLogprob | None] = [None] * len(tokens)
    wanting = [row for row, request in enumerate(requests) if request.params.wants_logprobs]
    if not wanting:
        return result
    found = sampling.token_logprobs(
        logits if len(wanting) == len(tokens) else logits[wanting],
        [tokens[row] for row in wanting],
        num_top=[requests[row].params.num_logprobs or 0 for row in wanting],
        wanted_ids=[requests[row].params.logprob_token_ids for row in wanting],
    )
    for row, logprob in zip(wanting, found, strict=True):
        result[row] = logprob
    return result
