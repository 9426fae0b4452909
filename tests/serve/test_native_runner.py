"""Steps in one call of C give each request what it gets alone, however its tokens are chosen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quantgate_serve.engine import Engine
from quantgate_serve.native.layer import find_kernels
from quantgate_serve.native.linear import FEWEST_LANES
from quantgate_serve.native_runner import NativeRunner
from quantgate_serve.request import Request

pytestmark = pytest.mark.skipif(
    (kernels := find_kernels()) is None or kernels.lanes < FEWEST_LANES,
    reason="no C compiler or no AVX2 here",
)
MakeEngine = Callable[..., Engine]
MakeRequest = Callable[..., Request]
RunAll = Callable[..., Any]

ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 3},
    "cut": {"temperature": 1.2, "top_k": 5, "seed": 4},
    "scored": {"num_logprobs": 2},
    "prompt": {"prompt_logprobs": True, "num_logprobs": 1},
}


def test_each_request_of_a_mixed_batch_gets_what_it_gets_alone(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    def make(name: str) -> Request:
        return make_request([5, 6, 7, len(name)], max_tokens=6, **ASKED[name])

    engine = make_engine(prefix_cache=False)
    assert isinstance(engine._runner, NativeRunner)
    together = [make(name) for name in ASKED]
    run_all(engine, together)
    for name, request in zip(ASKED, together, strict=True):
        alone = make(name)
        run_all(make_engine(prefix_cache=False), [alone])
        assert request.output_ids == alone.output_ids, name
        assert request.logprobs == alone.logprobs, name
        assert request.prompt_logprobs == alone.prompt_logprobs, name


def test_tokens_follow_the_logits_that_the_runner_is_given(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    engine = make_engine(prefix_cache=False)
    runner: Any = engine._runner
    compute = runner._forward

    def prefer_nine(*arguments: Any) -> torch.Tensor:
        logits: torch.Tensor = compute(*arguments).clone()
        logits[:, 9] = 1e6
        return logits

    runner._forward = prefer_nine
    request = make_request([5, 6], max_tokens=3, ignore_eos=True, num_logprobs=0)
    run_all(engine, [request])
    assert request.output_ids == [9, 9, 9]


def test_a_batch_of_plain_requests_never_enters_torch(
    make_engine: MakeEngine,
    make_request: MakeRequest,
    run_all: RunAll,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(prefix_cache=False)
    asked = [make_request([5, 6, 7, n], max_tokens=6) for n in range(3)]
    run_all(make_engine(prefix_cache=False), asked)
    for way in ("_forward", "_send", "_collect", "_choose"):
        monkeypatch.setattr(engine._runner, way, pytest.fail)
    again = [make_request([5, 6, 7, n], max_tokens=6) for n in range(3)]
    run_all(engine, again)
    assert [r.output_ids for r in again] == [r.output_ids for r in asked]


def test_a_plain_step_after_one_that_failed_while_embedding_is_whole(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    engine = make_engine(prefix_cache=False)
    runner: Any = engine._runner
    take = runner._hidden_states.take
    runner._hidden_states.take = lambda: 1 / 0
    embedded = make_request([5, 6], max_tokens=0, embeds=True)
    run_all(engine, [embedded])
    assert embedded.error is not None
    runner._hidden_states.take = take
    request = make_request([5, 6], max_tokens=4, ignore_eos=True)
    run_all(engine, [request])
    assert request.error is None
    assert request.num_output == 4
