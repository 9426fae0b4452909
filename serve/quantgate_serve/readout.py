"""What is read of a step: of which tokens logits are computed, and what is made of them.

Tokens are chosen where the logits are, and nothing here waits for them: they come to the host as
one small tensor, and what was asked along is read beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantgate_serve import sampling
from quantgate_serve.constraints import Constraints
from quantgate_serve.request import Request, TokenLogprob
from quantgate_serve.scheduler import Chunk

_NOTHING = range(0)


@dataclass(slots=True)
class ChunkResult:
    """What a chunk gave: the next token if it ended its sequence, and what was asked along."""

    chunk: Chunk
    token_id: int | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: Sequence[TokenLogprob] = ()
    # [H]: the last hidden states of its tokens, added up, for a request that embeds.
    hidden_sum: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Readout:
    """The logits that a step of T tokens needs, by the numbers of its tokens.

    `rows` are tokens whose logits are computed, `embedded` those whose hidden states are wanted.
    `sampled` chunks get a token, each out of the row of the logits that `sampled_at` names.
    `targets` are the prompt positions to score, by chunk; None while no chunk has any.
    """

    chunks: Sequence[Chunk]
    num_tokens: int
    rows: list[int]
    embedded: list[int]
    sampled: list[Request]
    sampled_at: list[int]
    targets: list[range] | None

    @property
    def reads_every_token(self) -> bool:
        """Whether `rows` are all tokens of the step, in order, and nothing else is wanted."""
        return len(self.sampled) == self.num_tokens == len(self.rows) and not self.embedded

    def choose(self, logits: Tensor, constraints: Constraints) -> Tensor:
        """The tokens [S] of the sampled chunks, on the device of `logits`."""
        requests = self.sampled
        if not requests:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        logits = self._of_sampled(logits)
        return sampling.choose_tokens(
            constraints.mask(logits, requests),
            [request.params for request in requests],
            [len(request.token_ids) - len(request.prompt_ids) for request in requests],
        )

    def results(self, logits: Tensor, tokens: list[int]) -> list[ChunkResult]:
        """What each chunk gave, in order; `tokens` are those that were chosen."""
        if len(tokens) == len(self.chunks):
            results = [ChunkResult(c, token) for c, token in zip(self.chunks, tokens, strict=True)]
            sampled = results
        else:
            results = [ChunkResult(chunk, None) for chunk in self.chunks]
            sampled = [result for result in results if _is_sampled(result.chunk)]
            for result, token in zip(sampled, tokens, strict=True):
                result.token_id = token
        if any(request.params.wants_logprobs for request in self.sampled):
            _add_logprobs(self._of_sampled(logits), sampled)
        if self.targets is not None:
            row = 0
            for result, targets in zip(results, self.targets, strict=True):
                end = row + len(targets)
                if targets:
                    result.prompt_logprobs = _read_prompt(result.chunk, targets, logits[row:end])
                row = end + _is_sampled(result.chunk)
        return results

    def _of_sampled(self, logits: Tensor) -> Tensor:
        if len(self.sampled) == logits.shape[0]:
            return logits
        return logits[sampling.on_device(self.sampled_at, logits.device)]


def plan_readout(chunks: Sequence[Chunk]) -> Readout:
    """What the step of `chunks`, one after another, has to give."""
    rows: list[int] = []
    embedded: list[int] = []
    sampled: list[Request] = []
    sampled_at: list[int] = []
    targets: list[range] | None = None
    first = 0
    for index, chunk in enumerate(chunks):
        request = chunk.request
        params = request.params
        end = first + chunk.length
        if params.prompt_logprobs and chunk.start < len(request.prompt_ids):
            found = _prompt_targets(chunk)
            if targets is None:
                targets = [_NOTHING] * len(chunks)
            targets[index] = found
            rows += [first + target - 1 - chunk.start for target in found]
        if params.max_tokens > 0 and chunk.start + chunk.length == len(request.token_ids):
            sampled.append(request)
            sampled_at.append(len(rows))
            rows.append(end - 1)
        if params.embeds:
            embedded += range(first, end)
        first = end
    return Readout(chunks, first, rows, embedded, sampled, sampled_at, targets)


def _is_sampled(chunk: Chunk) -> bool:
    return chunk.is_last and chunk.request.params.max_tokens > 0


def _prompt_targets(chunk: Chunk) -> range:
    """Positions of prompt tokens whose log-probability this chunk gives for the first time."""
    request = chunk.request
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


def _add_logprobs(logits: Tensor, results: list[ChunkResult]) -> None:
    """Read what those of `results` want that want log-probabilities; a row of `logits` each."""
    wanting = [
        row for row, result in enumerate(results) if result.chunk.request.params.wants_logprobs
    ]
    chosen = [results[row] for row in wanting]
    found = sampling.token_logprobs(
        logits if len(wanting) == len(results) else logits[wanting],
        [result.token_id or 0 for result in chosen],
        num_top=[result.chunk.request.params.num_logprobs or 0 for result in chosen],
        wanted_ids=[result.chunk.request.params.logprob_token_ids for result in chosen],
    )
    for result, logprob in zip(chosen, found, strict=True):
        result.logprob = logprob
