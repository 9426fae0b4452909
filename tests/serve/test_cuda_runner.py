"""The CUDA runner, on the CPU: the same tokens, replayed or not.

The decode is plain torch, and a "graph" repeats its forward over the recorded inputs, so that what
is tested is everything but the kernels, the pinned copies and torch's recording.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface

from quantgate_serve.attention import cuda_paged
from quantgate_serve.attention.decode_torch import paged_decode_torch
from quantgate_serve.channel import Counts, StepReport, Stop, Submit, asked
from quantgate_serve.cuda_runner import CudaRunner
from quantgate_serve.engine import Engine
from quantgate_serve.engine_host import EngineHost
from quantgate_serve.graphs import DecodeInputs, Forward, batch_sizes
from quantgate_serve.kernels import Kernel
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.loading import load
from quantgate_serve.metrics import EngineMetrics
from quantgate_serve.request import Request

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
}


def repeat_on_replay(forward: Forward, inputs: DecodeInputs) -> tuple[Callable[[], None], Tensor]:
    """A stand-in for a CUDA graph: computes again from the same tensors into the same output."""
    output = forward(inputs).clone()

    def replay() -> None:
        output.copy_(forward(inputs))

    return replay, output


def fail_to_capture(forward: Forward, inputs: DecodeInputs) -> tuple[Callable[[], None], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing")


MakeCuda = Callable[..., tuple[Engine, CudaRunner]]


@pytest.fixture
def make_cuda(make_engine: Callable[..., Engine]) -> MakeCuda:
    """An engine whose runner is the CUDA one."""

    def make(folder: Path, **changes: Any) -> tuple[Engine, CudaRunner]:
        AttentionInterface.register(cuda_paged.ATTENTION_NAME, cuda_paged.cuda_attention)
        loaded = load(folder, device="cpu", dtype="auto", attention=cuda_paged.ATTENTION_NAME)
        engine = make_engine(folder, **changes)
        pool = engine._scheduler.pool
        kv = KVStorage(
            loaded.kv_shape, num_pages=pool.num_pages, page_size=pool.page_size, device=CPU
        )
        runner = CudaRunner(
            loaded, kv, engine.metrics, decode=paged_decode_torch, num_splits=lambda *_: 1
        )
        engine._runner = runner
        return engine, runner

    return make


CPU = torch.device("cpu")
PLAIN = (Kernel("torch Linear float32", 15),)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_graphs_the_tokens_are_those_of_generate(
    family: str,
    save_model: Callable[..., Path],
    config_of: Callable[..., Any],
    make_cuda: MakeCuda,
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
) -> None:
    kind, changes = FAMILIES[family]
    folder = save_model(config_of(getattr(transformers, kind), **changes))
    engine, _ = make_cuda(folder)
    requests = [make_request(prompt) for prompt in prompts(12)]
    run_all(engine, requests)
    for request in requests:
        assert request.output_ids == generate(folder, request.prompt_ids)


@pytest.mark.parametrize("max_batch_size", [1, 5, 16])
def test_replayed_batches_of_every_size_give_the_tokens_of_generate(
    max_batch_size: int,
    llama_folder: Path,
    make_cuda: MakeCuda,
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
) -> None:
    engine, runner = make_cuda(llama_folder, max_batch_size=max_batch_size)
    runner.record_graphs(PLAIN, max_batch_size=max_batch_size, capture=repeat_on_replay)
    # Unequal ends make the batch shrink through sizes that were not recorded.
    requests = [
        make_request(prompt, max_tokens=4 + index % 9) for index, prompt in enumerate(prompts(20))
    ]
    run_all(engine, requests)
    for request in requests:
        count = request.params.max_tokens
        expected = generate(llama_folder, request.prompt_ids, max_tokens=count)
        assert request.output_ids == expected
    assert engine.metrics.graph_hits
    assert engine.metrics.graph_misses is not None
    assert set(engine.metrics.graph_misses) <= {"prompts in the step"}
    assert engine.metrics.now.graph_bytes == 0  # the CPU's stand-in takes no device memory
    null = runner._kv.null_page
    assert not any(tensor[null].any() for tensor in (*runner._kv.keys, *runner._kv.values))


def test_embeddings_are_those_of_the_other_runner_and_leave_replayed_decodes_alone(
    llama_folder: Path,
    make_cuda: MakeCuda,
    make_engine: Callable[..., Engine],
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
) -> None:
    engine, runner = make_cuda(llama_folder)
    runner.record_graphs(PLAIN, max_batch_size=16, capture=repeat_on_replay)
    found, expected = (
        [make_request(prompt, max_tokens=0, embeds=True) for prompt in prompts(6)] for _ in range(2)
    )
    texts = [make_request(prompt) for prompt in prompts(5)]
    run_all(engine, [*texts[:3], *found, *texts[3:]])
    run_all(make_engine(), expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(mine.embedding), torch.tensor(theirs.embedding), atol=5e-3, rtol=0
        )  # BF16 here, FP32 there
    assert engine.metrics.graph_hits


def test_a_shared_prefix_reads_the_pages_of_another_request(
    llama_folder: Path,
    make_cuda: MakeCuda,
    make_request: Callable[..., Request],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
) -> None:
    engine, _ = make_cuda(llama_folder, max_batched_tokens=24)
    prompt = list(range(2, 60))
    run_all(engine, [make_request(prompt)])
    others = [make_request([*prompt[:40], 5, 6, 7]), make_request([9, 8, 7])]
    run_all(engine, others)
    assert others[0].num_cached == 32
    for request in others:
        assert request.output_ids == generate(llama_folder, request.prompt_ids)


def test_with_the_triton_kernel_the_tokens_are_those_of_generate(
    llama_folder: Path,
    make_cuda: MakeCuda,
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install -e .[triton]")
    from quantgate_serve.attention.triton_paged import paged_decode

    engine, runner = make_cuda(llama_folder)
    runner._decode = paged_decode
    runner._num_splits = lambda *_: 2
    runner.compile_decodes((1, 2))
    requests = [make_request(prompt, max_tokens=4) for prompt in prompts(4)]
    run_all(engine, requests)
    for request in requests:
        assert request.output_ids == generate(llama_folder, request.prompt_ids, max_tokens=4)


def test_what_cannot_be_captured_is_served_without_graphs_and_said(
    llama_folder: Path,
    make_cuda: MakeCuda,
    make_request: Callable[..., Request],
    run_all: Callable[[Engine, list[Request]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, runner = make_cuda(llama_folder)
    outliers = replace(PLAIN[0], uncapturable="looks for outliers")
    runner.record_graphs([outliers], max_batch_size=4, capture=repeat_on_replay)
    assert "no CUDA graphs for this model: torch Linear float32: looks for outliers" in caplog.text
    assert engine.metrics.graph_hits is None
    runner.record_graphs(PLAIN, max_batch_size=4, capture=fail_to_capture)
    assert "recording a batch of 4 failed: operation not permitted" in caplog.text
    request = make_request([5, 6, 7])
    run_all(engine, [request])
    assert request.num_output == 12
    assert engine.metrics.graph_hits == 0
    assert engine.metrics.graph_misses == {"not recorded": 11}


def watch_inputs(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Notes of each step with decodes what its inputs say, and compares that with the requests."""
    seen: list[list[list[int]]] = []
    upload = runner._upload

    def watched(readout: Any, decodes: Any, prompts: Any) -> Any:
        found = upload(readout, decodes, prompts)
        if decodes:
            rows = found[0].rows_BW.tolist()
            for row, chunk in zip(rows, decodes, strict=True):
                assert row[0] == chunk.request.token_ids[chunk.start]
                assert row[1] == chunk.start
                needed = chunk.start // runner._kv.page_size + 1
                assert row[2 : 2 + needed] == chunk.request.pages[:needed]
            seen.append(rows)
        return found

    monkeypatch.setattr(runner, "_upload", watched)
    return seen


def test_inputs_sent_ahead_are_those_of_the_step_whoever_ends_meanwhile(
    llama_folder: Path,
    make_cuda: MakeCuda,
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, runner = make_cuda(llama_folder)
    runner.record_graphs(PLAIN, max_batch_size=16, capture=repeat_on_replay)
    watch_inputs(runner, monkeypatch)
    expected = [generate(llama_folder, prompt, max_tokens=30) for prompt in prompts(24)]
    requests = [make_request(prompt, max_tokens=30) for prompt in prompts(24)]
    # Every other one ends by a token of its own that nobody can foresee.
    for index, (request, tokens) in enumerate(zip(requests, expected, strict=True)):
        if index % 2:
            request.params = replace(request.params, ignore_eos=False)
            request.eos_ids = frozenset([tokens[3 + index]])
    run_all(engine, requests)
    for index, (request, tokens) in enumerate(zip(requests, expected, strict=True)):
        end = tokens.index(tokens[3 + index]) + 1 if index % 2 else 30
        assert request.output_ids == tokens[:end]
    assert runner.num_foreseen > 10 * runner.num_built


def test_a_request_that_leaves_between_two_steps_is_left_out_of_the_inputs(
    llama_folder: Path,
    make_cuda: MakeCuda,
    make_request: Callable[..., Request],
    generate: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, runner = make_cuda(llama_folder)
    seen = watch_inputs(runner, monkeypatch)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    requests = [make_request(prompt) for prompt in prompts]
    engine.submit(requests)
    engine.step()
    engine.step()
    engine.abort([requests[1]])
    joining = make_request([20, 21])
    engine.submit([joining])
    while engine.has_work:
        engine.step()
        engine._scheduler.check_integrity()
    assert [len(rows) for rows in seen[:3]] == [3, 2, 3]
    assert (runner.num_foreseen, runner.num_built) == (len(seen), 0)
    for request in (requests[0], requests[2], joining):
        assert request.output_ids == generate(llama_folder, request.prompt_ids)


@pytest.mark.parametrize("seed", range(4))
def test_failing_steps_and_interruptions_drop_what_was_foreseen_and_change_no_token(
    seed: int,
    llama_folder: Path,
    make_cuda: MakeCuda,
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = random.Random(seed)
    engine, runner = make_cuda(
        llama_folder, kv_tokens=208, prefix_cache=seed % 2 == 0, max_batched_tokens=48
    )
    watch_inputs(runner, monkeypatch)
    collect = runner._collect

    def fail_late(readout: Any, *rest: Any) -> Any:
        if len(readout.chunks) > 1 and source.random() < 0.2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return collect(readout, *rest)

    monkeypatch.setattr(runner, "_collect", fail_late)
    requests = [make_request(prompt, max_tokens=40) for prompt in prompts(10)]
    run_all(engine, requests)
    for request in requests:
        assert request.output_ids == generate(llama_folder, request.prompt_ids, max_tokens=40)
    assert engine.metrics.oom_retry
    assert engine.metrics.preemptions
    assert runner.num_foreseen
    assert runner.num_built


def test_the_front_is_told_of_a_step_while_the_next_one_is_computed(
    llama_folder: Path,
    make_cuda: MakeCuda,
    make_request: Callable[..., Request],
    generate: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, runner = make_cuda(llama_folder)
    events: list[str] = []
    told: list[int] = []
    launch, collect = runner.launch, runner._collect

    def launched(plan: Any) -> Any:
        events.append("launch")
        return launch(plan)

    def collected(*parts: Any) -> Any:
        events.append("collect")
        return collect(*parts)

    class Front:
        """Asks for one request, and stops the engine when it has been answered."""

        def receive(self, _timeout_s: float | None) -> list[Any]:
            if not events:
                return [Submit([asked(request)])]
            return [Stop()] if len(told) == 12 else []

        def send(self, report: StepReport | Counts) -> None:
            if isinstance(report, Counts):
                return
            events.append("tell")
            told.extend(report.tokens)
            for ended in report.ended:
                told.extend(ended.tokens)

    monkeypatch.setattr(runner, "launch", launched)
    monkeypatch.setattr(runner, "_collect", collected)
    request = make_request([5, 6, 7])
    request.is_streaming = True
    front: Any = Front()
    EngineHost(engine, front).run()
    assert told == generate(llama_folder, [5, 6, 7])
    assert events[:2] == ["launch", "collect"]
    assert events[2:-1] == ["launch", "tell", "collect"] * 11
    assert events[-1] == "tell"  # nothing more to compute: at once
    assert sum(engine.metrics.step_s.counts) == 12


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (8, [1, 2, 4, 8]),
        (9, [1, 2, 4, 8, 9]),
        (40, [1, 2, 4, 8, 16, 24, 32, 40]),
    ],
)
def test_recorded_sizes_end_with_the_largest_batch(largest: int, expected: list[int]) -> None:
    assert batch_sizes(largest) == expected


def test_metrics_of_graphs_start_absent() -> None:
    metrics = EngineMetrics()
    assert metrics.graph_hits is None
    assert metrics.graph_misses is None
