"""Workloads: a seeded list of timed requests, the same for every arm that replays it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from quantgate.files import sha256_of_json

FloatArray: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRequest:
    """One request. `at_s` is its scheduled send time from the start of the block."""

    at_s: float
    prompt_ids: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWorkload:
    """What one block replays: a burst for throughput, then open-loop arrivals for latency."""

    burst: tuple[TimedRequest, ...]
    steady: tuple[TimedRequest, ...]

    @property
    def sha256(self) -> str:
        phases = [
            [[r.at_s, list(r.prompt_ids), r.output_tokens] for r in phase]
            for phase in (self.burst, self.steady)
        ]
        return sha256_of_json(phases)


def make_block_workload(
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    block: int,
    burst_requests: int,
    steady_requests: int,
    rate_rps: float,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
) -> BlockWorkload:
    """Draws the requests of one block; a pure function of its arguments.

    Prompts are cut from `prompts`, real text of the model's language, to lengths drawn uniformly
    from `prompt_tokens`; shorter documents are joined. Arrivals of the steady phase are Poisson at
    `rate_rps`; the burst arrives at once. Output lengths are fixed per request (the client asks the
    server to ignore the end token), so that every arm does the same work.
    """
    random = np.random.default_rng([seed, block])

    def draw(count: int, times_s: FloatArray) -> tuple[TimedRequest, ...]:
        return tuple(
            TimedRequest(
                at_s=float(times_s[i]),
                prompt_ids=_cut(prompts, random, int(random.integers(*_closed(prompt_tokens)))),
                output_tokens=int(random.integers(*_closed(output_tokens))),
            )
            for i in range(count)
        )

    burst = draw(burst_requests, np.zeros(burst_requests))
    gaps_s = random.exponential(1.0 / rate_rps, steady_requests)
    return BlockWorkload(burst=burst, steady=draw(steady_requests, np.cumsum(gaps_s)))


def _closed(bounds: tuple[int, int]) -> tuple[int, int]:
    return bounds[0], bounds[1] + 1


def _cut(
    prompts: Sequence[Sequence[int]], random: np.random.Generator, length: int
) -> tuple[int, ...]:
    """Cuts `length` tokens from joined documents, starting anywhere in the first.

    Starting at a random place keeps prompts from sharing prefixes that real traffic would not.
    """
    first = prompts[int(random.integers(len(prompts)))]
    ids = list(first[int(random.integers(len(first))) :])
    while len(ids) < length:
        ids += prompts[int(random.integers(len(prompts)))]
    return tuple(ids[:length])
