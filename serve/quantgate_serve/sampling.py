"""From logits to tokens and log-probabilities, all requests of a step at once.

A draw is a hash of (the request's seed, its position), so a request's samples depend neither on its
batch mates nor on a retry or preemption in between.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantgate_serve.request import SamplingParams, TokenLogprob

_MASK = (1 << 64) - 1


def choose_tokens(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """The next token of each row of `logits` [N, V]; `positions` are output positions."""
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    sampled = [row for row, p in enumerate(params) if not p.is_greedy]
    if sampled:
        drawn = _draw(
            logits[sampled].float(),
            [params[row] for row in sampled],
            [uniform(params[row].seed, positions[row]) for row in sampled],
        )
        for row, token in zip(sampled, drawn, strict=True):
            tokens[row] = token
    return tokens


def token_logprobs(
    logits: Tensor,
    tokens: Sequence[int],
    *,
    num_top: Sequence[int],
    wanted_ids: Sequence[tuple[int, ...]],
) -> list[TokenLogprob]:
    """Raw log-probabilities under `logits` [N, V]: of `tokens`, the best, of `wanted_ids`."""
    device = logits.device
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = (
        logprobs.gather(1, torch.tensor(tokens, device=device).unsqueeze(1)).squeeze(1).tolist()
    )
    most = min(max(num_top), logprobs.shape[1])
    top_values: list[list[float]] = [[]] * len(tokens)
    top_ids: list[list[int]] = [[]] * len(tokens)
    if most:
        top = logprobs.topk(most, dim=-1)
        top_values, top_ids = top.values.tolist(), top.indices.tolist()
    result = []
    for row, token in enumerate(tokens):
        count = num_top[row]
        pairs = tuple(zip(top_ids[row][:count], top_values[row][:count], strict=True))
        wanted = _pick(logprobs[row], wanted_ids[row]) if wanted_ids[row] else ()
        result.append(TokenLogprob(token, chosen[row], pairs, wanted))
    return result


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1) from (seed, position): two rounds of splitmix64."""
    bits = _splitmix64(_splitmix64(seed & _MASK) ^ (position & _MASK))
    return ((bits >> 11) + 0.5) / (1 << 53)


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _pick(logprobs: Tensor, ids: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(logprobs.index_select(0, torch.tensor(ids, device=logprobs.device)).tolist())


def _draw(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Inverse-CDF sampling over tokens sorted by probability; top-k and top-p cut the tail."""
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device)
    ordered = (logits / temperature.unsqueeze(1)).sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(ordered.values, dim=-1, dtype=torch.float64)  # [N, V]
    ranks = torch.arange(logits.shape[1], device=device)
    top_k = torch.tensor([p.top_k or logits.shape[1] for p in params], device=device)
    probabilities = probabilities.masked_fill(ranks >= top_k.unsqueeze(1), 0.0)
    # top_p counts what is left after top_k, as in transformers and vLLM.
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    cumulative = probabilities.cumsum(dim=-1)
    top_p = torch.tensor([p.top_p for p in params], device=device, dtype=torch.float64)
    # A token stays while the mass before it is below top_p, so the first one always does.
    is_kept = (cumulative - probabilities < top_p.unsqueeze(1)) & (probabilities > 0)
    cumulative = (probabilities * is_kept).cumsum(dim=-1)
    target = torch.tensor(draws, device=device, dtype=torch.float64) * cumulative[:, -1]
    rank = (cumulative <= target.unsqueeze(1)).sum(dim=-1)
    rank = torch.minimum(rank, is_kept.sum(dim=-1) - 1)
    return ordered.indices.gather(1, rank.unsqueeze(1)).squeeze(1).tolist()
