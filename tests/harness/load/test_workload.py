"""Workloads: the same list for everyone who asks with the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantgate.load.stage import workload_digests
from quantgate.load.workload import BlockWorkload, make_block_workload

PROMPTS = [list(range(100, 110)), list(range(200, 230))]


def make(**changes: Any) -> BlockWorkload:
    values: dict[str, Any] = {
        "seed": 1,
        "block": 0,
        "burst_requests": 4,
        "steady_requests": 50,
        "rate_rps": 20.0,
        "prompt_tokens": (3, 6),
        "output_tokens": (2, 4),
    }
    return make_block_workload(PROMPTS, **(values | changes))


def test_the_same_arguments_give_the_same_requests() -> None:
    assert make() == make()
    assert make().sha256 == make().sha256


def test_another_seed_or_block_gives_other_requests() -> None:
    digests = {make().sha256, make(seed=2).sha256, make(block=1).sha256}
    assert len(digests) == 3
    named = workload_digests([make(), make(block=1)])
    assert named == {"block-00": make().sha256, "block-01": make(block=1).sha256}


def test_the_burst_arrives_at_once_and_the_steady_phase_in_order() -> None:
    workload = make()
    assert [request.at_s for request in workload.burst] == [0.0] * 4
    times = [request.at_s for request in workload.steady]
    assert times == sorted(times)
    assert times[0] > 0


def test_arrivals_are_poisson_at_the_rate() -> None:
    times = [request.at_s for request in make(steady_requests=20_000).steady]
    gaps = np.diff([0.0, *times])
    # The mean and the standard deviation of an exponential are equal; 20,000 gaps show both
    # within 0.7 % (one standard error), so 4 % is far outside chance.
    assert np.isclose(gaps.mean(), 1 / 20, rtol=0.04)
    assert np.isclose(gaps.std(), 1 / 20, rtol=0.04)


def test_lengths_reach_both_ends_of_their_range_and_go_no_further() -> None:
    requests = make(steady_requests=500).steady
    assert {len(request.prompt_ids) for request in requests} == {3, 4, 5, 6}
    assert {request.output_tokens for request in requests} == {2, 3, 4}


def test_short_documents_are_joined_to_the_length_asked_for() -> None:
    requests = make(prompt_tokens=(64, 64)).steady
    assert {len(request.prompt_ids) for request in requests} == {64}
    known = {token for prompt in PROMPTS for token in prompt}
    assert {token for request in requests for token in request.prompt_ids} <= known
