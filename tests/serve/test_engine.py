"""The engine as a whole: the right tokens, whoever shares the batch, whatever fails."""

import copy
import gc
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantgate_serve.admission import QueueFullError, RequestTooLongError
from quantgate_serve.engine import Engine
from quantgate_serve.kv.pool import PageIntegrityError
from quantgate_serve.kv.roots import CacheRoots
from quantgate_serve.request import FinishReason, Request
from quantgate_serve.runner import Collect
from quantgate_serve.scheduler import Chunk

MakeEngine = Callable[..., Engine]
MakeRequest = Callable[..., Request]
Prompts = Callable[[int], list[list[int]]]
RunAll = Callable[[Engine, list[Request]], None]
Generate = Callable[..., list[int]]


class FailingRunner:
    """Runs steps, but raises where `fails` says so."""

    def __init__(self, runner: Any, fails: Callable[[Sequence[Chunk]], Exception | None]) -> None:
        self._runner = runner
        self._fails = fails

    def launch(self, plan: Sequence[Chunk]) -> Collect:
        error = self._fails(plan)
        if error is not None:
            raise error
        collect: Collect = self._runner.launch(plan)
        return collect

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_greedy_tokens_equal_generate_on_64_ragged_prompts(
    make_engine: MakeEngine,
    make_request: MakeRequest,
    prompts: Prompts,
    run_all: RunAll,
    generate: Generate,
    llama_folder: Path,
    prefix_cache: bool,
) -> None:
    engine = make_engine(prefix_cache=prefix_cache)
    requests = [make_request(prompt) for prompt in prompts(64)]
    run_all(engine, requests)
    for request in requests:
        assert request.output_ids == generate(llama_folder, request.prompt_ids)
        assert request.finish_reason is FinishReason.LENGTH


def test_a_full_pool_preempts_and_changes_no_token(
    make_engine: MakeEngine,
    make_request: MakeRequest,
    prompts: Prompts,
    run_all: RunAll,
    generate: Generate,
    llama_folder: Path,
) -> None:
    engine = make_engine(kv_tokens=160, prefix_cache=False)
    requests = [make_request(prompt, max_tokens=40) for prompt in prompts(10)]
    run_all(engine, requests)
    assert engine.metrics.preemptions > 0
    for request in requests:
        assert request.output_ids == generate(llama_folder, request.prompt_ids, max_tokens=40)


def test_a_repeated_prompt_reuses_its_pages(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    engine = make_engine()
    prompt = list(range(2, 52))
    first, second = make_request(prompt), make_request(prompt)
    run_all(engine, [first])
    run_all(engine, [second])
    assert (first.num_cached, second.num_cached) == (0, 48)
    assert first.output_ids == second.output_ids


def test_a_long_prompt_is_computed_in_chunks_beside_decodes(
    make_engine: MakeEngine,
    make_request: MakeRequest,
    run_all: RunAll,
    generate: Generate,
    llama_folder: Path,
) -> None:
    engine = make_engine(max_batched_tokens=16)
    source = random.Random(1)
    long = [source.randrange(2, 384) for _ in range(200)]
    short = make_request([5, 6, 7], max_tokens=10)
    engine.submit([short])
    engine.step()
    request = make_request(long)
    run_all(engine, [request])
    assert request.output_ids == generate(llama_folder, long)
    # The short one decoded in every step, so it was done before the long prompt was.
    assert short.finished_ns < request.finished_ns
    assert short.output_ids == generate(llama_folder, [5, 6, 7], max_tokens=10)


def test_samples_do_not_depend_on_batch_mates(
    make_engine: MakeEngine, make_request: MakeRequest, prompts: Prompts, run_all: RunAll
) -> None:
    def sampled() -> list[Request]:
        return [
            make_request(prompt, temperature=1.0, top_p=0.9, seed=seed)
            for seed, prompt in enumerate(prompts(12))
        ]

    together = sampled()
    run_all(make_engine(), together)
    alone = sampled()
    engine = make_engine(max_batch_size=1)
    run_all(engine, alone)
    assert [r.output_ids for r in together] == [r.output_ids for r in alone]
    assert len({tuple(r.output_ids) for r in together}) == 12


def test_logprobs_equal_those_of_a_plain_forward(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll, llama_folder: Path
) -> None:
    from quantgate_serve import offline

    prompt = list(range(10, 50))
    request = make_request(
        prompt, num_logprobs=3, prompt_logprobs=True, logprob_token_ids=(4, 9), max_tokens=5
    )
    run_all(make_engine(max_batched_tokens=16), [request])
    (expected,) = offline.log_probs(
        offline.load_model(llama_folder, device="cpu"), [request.token_ids]
    )
    entries = request.prompt_logprobs + request.logprobs
    assert [entry.token_id for entry in entries] == request.token_ids[1:]
    for row, entry in zip(expected, entries, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
    for row, entry in zip(expected[len(prompt) - 1 :], request.logprobs, strict=False):
        assert entry.of_token_ids == pytest.approx((row[4].item(), row[9].item()), abs=1e-4)


def test_max_tokens_zero_scores_the_prompt_and_ends(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    request = make_request([3, 4, 5], max_tokens=0, num_logprobs=0, prompt_logprobs=True)
    run_all(make_engine(), [request])
    assert request.output_ids == []
    assert [entry.token_id for entry in request.prompt_logprobs] == [4, 5]
    assert request.finish_reason is FinishReason.LENGTH


def test_an_end_token_stops_unless_ignored(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    free = make_request([7, 8, 9])
    run_all(make_engine(), [free])
    third = free.output_ids[2]
    at = free.output_ids.index(third)
    stopped = make_request([7, 8, 9], ignore_eos=False)
    stopped.eos_ids = frozenset([third])
    ignoring = make_request([7, 8, 9])
    ignoring.eos_ids = frozenset([third])
    run_all(make_engine(), [stopped, ignoring])
    assert stopped.output_ids == free.output_ids[: at + 1]
    assert (stopped.finish_reason, stopped.ended_by_eos) == (FinishReason.STOP, True)
    assert ignoring.output_ids == free.output_ids


def test_abort_frees_pages_before_the_next_step(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    engine = make_engine(prefix_cache=False)
    running, queued = make_request([2] * 40, max_tokens=100), make_request([3] * 40)
    engine.submit([running])
    engine.step()
    assert engine._scheduler.pool.num_used > 0
    engine.submit([queued])
    engine.abort([running, queued])
    assert engine._scheduler.pool.num_used == 0
    assert engine.step().ended == [running, queued]
    assert (running.finish_reason, queued.finish_reason) == (FinishReason.ABORT,) * 2
    assert not engine.has_work


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        ValueError("a bug"),
    ],
)
def test_a_step_that_always_fails_with_one_request_ends_only_that_one(
    error: Exception,
    make_engine: MakeEngine,
    make_request: MakeRequest,
    prompts: Prompts,
    run_all: RunAll,
    generate: Generate,
    llama_folder: Path,
) -> None:
    engine = make_engine()
    requests = [make_request(prompt) for prompt in prompts(9)]
    culprit = requests[4]
    engine._runner = FailingRunner(  # type: ignore[assignment]
        engine._runner, lambda plan: error if any(c.request is culprit for c in plan) else None
    )
    run_all(engine, requests)
    assert culprit.finish_reason is FinishReason.ERROR
    assert culprit.error is not None
    is_oom = not isinstance(error, ValueError)
    assert culprit.error.code == ("out_of_memory" if is_oom else "engine_error")
    assert (engine.metrics.oom > 0, engine.metrics.step_errors > 0) == (is_oom, not is_oom)
    for request in requests:
        if request is not culprit:
            assert request.output_ids == generate(llama_folder, request.prompt_ids)


def test_memory_that_runs_out_at_random_steps_changes_no_token(
    make_engine: MakeEngine,
    make_request: MakeRequest,
    prompts: Prompts,
    run_all: RunAll,
) -> None:
    def mixed() -> list[Request]:
        return [
            make_request(prompt, temperature=float(i % 2), seed=i, num_logprobs=1)
            for i, prompt in enumerate(prompts(16))
        ]

    calm = mixed()
    run_all(make_engine(), calm)
    source = random.Random(0)
    engine = make_engine()
    engine._runner = FailingRunner(  # type: ignore[assignment]
        engine._runner,
        lambda plan: torch.OutOfMemoryError() if len(plan) > 1 and source.random() < 0.4 else None,
    )
    shaken = mixed()
    run_all(engine, shaken)
    assert engine.metrics.oom_retry > 3
    assert [r.output_ids for r in shaken] == [r.output_ids for r in calm]
    assert all(len(r.logprobs) == r.num_output for r in shaken)


@pytest.mark.parametrize("seed", range(12))
def test_memory_that_runs_out_ends_only_who_cannot_fit_alone_also_across_preemption(
    seed: int,
    make_engine: MakeEngine,
    make_request: MakeRequest,
    prompts: Prompts,
    run_all: RunAll,
    generate: Generate,
    llama_folder: Path,
) -> None:
    source = random.Random(seed)
    engine = make_engine(kv_tokens=160, prefix_cache=seed % 2 == 0, max_batched_tokens=48)
    requests = [make_request(prompt, max_tokens=40) for prompt in prompts(10)]
    culprit = source.choice(requests)
    fatal_at = source.randrange(40)

    def fails(plan: Sequence[Chunk]) -> Exception | None:
        is_fatal = any(c.request is culprit and c.request.num_output >= fatal_at for c in plan)
        if is_fatal or (len(plan) > 1 and source.random() < 0.3):
            return torch.OutOfMemoryError("CUDA out of memory")
        return None

    engine._runner = FailingRunner(engine._runner, fails)  # type: ignore[assignment]
    run_all(engine, requests)
    assert culprit.error is not None
    assert culprit.error.code == "out_of_memory"
    assert culprit.num_output == fatal_at
    for request in requests:
        if request is not culprit:
            expected = generate(llama_folder, request.prompt_ids, max_tokens=40)
            assert request.output_ids == expected
    assert engine.metrics.preemptions > 0
    assert engine.metrics.oom > engine.metrics.oom_retry > 0
    assert engine.metrics.finished == {"length": 9, "error": 1}


@contextmanager
def scarce_memory(*, num_bytes: int, refused: int) -> Iterator[None]:
    """This process gets `num_bytes` more, and `refused` bytes in one piece from nowhere.

    The limit alone does not make sure of that: what others freed in small pieces stays in the heap,
    joined to larger ones, and whoever gets one of those maps nothing.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    held: list[torch.Tensor] = []
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        with suppress(RuntimeError):
            while True:
                held.append(torch.empty(refused, dtype=torch.uint8))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("freed_blocks", [0, 2000])
def test_memory_that_really_runs_out_ends_only_the_oversized_request(
    freed_blocks: int,
    save_model: Callable[..., Path],
    config_of: Callable[..., Any],
    make_engine: MakeEngine,
    make_request: MakeRequest,
    generate: Generate,
) -> None:
    # 200 rows of logits take 96 MB, one takes half a megabyte.
    folder = save_model(config_of(transformers.LlamaConfig, vocab_size=120_000))
    engine = make_engine(folder, max_batched_tokens=512)
    small = [make_request([i + 2, 3, 4], max_tokens=8) for i in range(4)]
    expected = [generate(folder, request.prompt_ids, max_tokens=8) for request in small]
    oversized = make_request([5] * 200, max_tokens=0, prompt_logprobs=True, num_logprobs=0)
    engine.warm_up()
    engine.submit([*small[:2], oversized, *small[2:]])
    gc.collect()  # else models that other tests left behind may be freed below the limit
    # Below malloc's threshold for mapping; the last one keeps the heap from shrinking.
    *blocks, last = [bytes(100_000) for _ in range(freed_blocks + 1)]
    del blocks
    with scarce_memory(num_bytes=48 * 2**20, refused=200 * 120_000 * 4):
        while engine.has_work:
            engine.step()
    del last
    assert oversized.error is not None
    assert oversized.error.code == "out_of_memory"
    assert [request.output_ids for request in small] == expected
    assert engine.metrics.oom > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt_logprobs", [False, True])
def test_logits_that_are_no_numbers_end_only_their_request_and_leave_no_trace(
    temperature: float,
    prompt_logprobs: bool,
    save_model: Callable[..., Path],
    config_of: Callable[..., Any],
    make_engine: MakeEngine,
    load_model: Callable[[Path], Any],
    make_request: MakeRequest,
    prompts: Prompts,
    run_all: RunAll,
    generate: Generate,
) -> None:
    folder = save_model(config_of(transformers.LlamaConfig))
    healthy = [make_request(prompt) for prompt in prompts(9)]
    expected = [generate(folder, request.prompt_ids) for request in healthy]
    said = {token for request in healthy for token in request.prompt_ids}
    said.update(*expected)
    poison = min(set(range(2, 384)) - said)
    model = load_model(folder).model
    model.get_input_embeddings().weight[poison] = float("nan")
    # So few pages that the next requests get those of the failed ones.
    engine = make_engine(folder, kv_tokens=512, prefix_cache=False)
    ill = [
        make_request(
            [*prompt, poison, 7],
            temperature=temperature,
            prompt_logprobs=prompt_logprobs,
            num_logprobs=1,
        )
        for prompt in prompts(3)
    ]
    run_all(engine, [*ill[:2], *healthy, ill[2]])
    again = [make_request(request.prompt_ids) for request in healthy]
    run_all(engine, again)
    for request in ill:
        assert request.error is not None
        assert request.error.code == "non_finite_logits"
        assert request.output_ids == []
    assert [request.output_ids for request in healthy] == expected
    assert [request.output_ids for request in again] == expected


def test_what_can_never_fit_is_refused(make_engine: MakeEngine, make_request: MakeRequest) -> None:
    with pytest.raises(RequestTooLongError, match="context length is 256 tokens"):
        make_engine().submit([make_request([2] * 200, max_tokens=57)])
    with pytest.raises(RequestTooLongError, match="KV cache holds 64 tokens"):
        make_engine(kv_tokens=64).submit([make_request([2] * 60, max_tokens=5)])
    make_engine(kv_tokens=64).submit([make_request([2] * 60, max_tokens=4)])


def test_a_full_queue_refuses_by_requests_and_by_tokens(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    engine = make_engine(max_queued_requests=2)
    engine.submit([make_request([2]), make_request([2])])
    with pytest.raises(QueueFullError, match="2 requests are queued") as caught:
        engine.submit([make_request([2])])
    assert caught.value.reason == "queued_requests"
    while engine.has_work:
        engine.step()
    engine.submit([make_request([2])])
    engine = make_engine(max_queued_tokens=50)
    engine.submit([make_request([2] * 40, max_tokens=40)])
    with pytest.raises(QueueFullError, match="80 tokens are queued"):
        engine.submit([make_request([2])])


def test_an_exhausted_engine_holds_no_queue_and_no_page(
    make_engine: MakeEngine, make_request: MakeRequest, prompts: Prompts, run_all: RunAll
) -> None:
    engine = make_engine(prefix_cache=False)
    run_all(engine, [make_request(prompt) for prompt in prompts(20)])
    assert engine._scheduler.pool.num_used == 0
    assert (engine._admission.num_requests, engine._admission.num_tokens) == (0, 0)
    assert engine.metrics.finished == {"length": 20}


def test_a_deadline_ends_requests_that_wait_and_requests_that_run(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    engine = make_engine(max_batch_size=1, prefix_cache=False)
    running, queued, other = (make_request([2] * 20, max_tokens=100) for _ in range(3))
    engine.submit([running, queued, other])
    engine.step()
    for request in (running, queued):
        request.deadline_ns = 1
        engine._scheduler._deadlines.add(request)
    ended = engine.step().ended
    assert {request.id for request in ended} == {running.id, queued.id}
    for request, phase in ((running, "running"), (queued, "queued")):
        assert request.error is not None
        assert request.error.code == "deadline_exceeded"
        assert f"while the request was {phase}" in request.error.message
    assert engine.metrics.deadline_expired == {"running": 1, "queued": 1}
    assert engine._scheduler.running == [other]
    assert engine._scheduler.pool.num_used == len(other.pages)
    while engine.has_work:
        engine.step()
    assert other.num_output == 100
    assert engine._admission.num_requests == 0


def test_a_window_lets_an_idle_engine_sleep_and_then_starts_all_at_once(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    engine = make_engine(admission_window_ms=50.0)
    first, second = make_request([2] * 8), make_request([3] * 8)
    engine.submit([first])
    engine.step()
    idle_s = engine.idle_s()
    assert idle_s is not None
    assert 0 < idle_s <= 0.05
    engine.submit([second])
    assert engine.idle_s() == 0
    while first.scheduled_ns == 0:
        engine.step()
    assert second.scheduled_ns == first.scheduled_ns
    assert (first.scheduled_ns - first.arrived_ns) / 1e9 >= 0.05
    engine.update_gauges()
    assert sum(engine.metrics.window_wait_s.counts) == 2


def test_prefixes_are_reused_inside_a_tenant_only(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    engine = make_engine()
    roots = CacheRoots()
    hits = []
    for tenant in ("a", "b", "a", "b"):
        request = make_request(list(range(2, 52)))
        request.tenant, request.cache_root = tenant, roots.of(tenant)
        run_all(engine, [request])
        hits.append(engine.metrics.prefix_hits)
    assert hits == [0, 0, 48, 96]
    assert engine.metrics.cross_tenant_hits == 0


def test_time_without_work_between_two_requests_is_not_busy(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    engine = make_engine()
    run_all(engine, [make_request([5, 6, 7], max_tokens=2)])
    before = engine.metrics.busy_s
    time.sleep(0.3)
    run_all(engine, [make_request([8, 9], max_tokens=1)])
    assert engine.metrics.busy_s - before < 0.3


def test_the_books_are_checked_at_rest_when_asked_to(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    for checks in (False, True):
        engine = make_engine(check_integrity=checks, prefix_cache=False)
        run_all(engine, [make_request([2] * 8)])
        engine.rest()
        engine._scheduler.pool.allocate(1)  # a leak
        if checks:
            with pytest.raises(PageIntegrityError):
                engine.rest()
        else:
            engine.rest()


@pytest.mark.parametrize("kv_tokens", [4096, 64])
def test_warm_up_leaves_nothing_behind_and_counts_nothing(
    make_engine: MakeEngine, kv_tokens: int
) -> None:
    """Also where it finds its own prefixes, and where its requests take each other's pages."""
    engine = make_engine(kv_tokens=kv_tokens)
    before = copy.deepcopy(engine.metrics)
    engine.warm_up()
    assert engine.is_warm
    assert engine._scheduler.pool.num_used == 0
    before.now = engine.metrics.now
    assert engine.metrics == before
