"""The arms of the GPU benchmark: one model in memory, served by us and by transformers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import AttentionInterface

from quantgate_serve.attention import cuda_paged
from quantgate_serve.attention.interface import ATTENTION_NAME, register
from quantgate_serve.attention.torch_paged import paged_attention
from quantgate_serve.config import ServerSettings
from quantgate_serve.engine import Engine
from quantgate_serve.loading import LoadedModel
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.startup import build_engine

_PAGE = 16


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """Why an arm has no number."""

    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` sequences that start together."""

    concurrency: int
    num_prompt: int
    num_output: int
    vocab_size: int

    def prompts(self) -> list[list[int]]:
        source = torch.Generator().manual_seed(self.concurrency)
        shape = (self.concurrency, self.num_prompt)
        ids: list[list[int]] = torch.randint(2, self.vocab_size, shape, generator=source).tolist()
        return ids


@dataclass(frozen=True, slots=True)
class OwnRun:
    """What our engine did. `step_s` is the median step in which every sequence decodes."""

    tok_per_s: float
    step_s: float | None
    context: int
    breakdown_ms: dict[str, float] | None
    graph_hits: int | None


@dataclass(slots=True)
class _Clock:
    """Seconds spent in wrapped calls, with the device waited for, so that they add up."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            started = perf_counter()
            result = call(*args, **options)
            wait(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - started
            return result

        return timed


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_own(loaded: LoadedModel, load: Load, limit_s: float) -> OwnRun:
    """Our engine, stepped by hand: once for the throughput, once more for where the time goes."""
    engine = _engine(loaded, load)
    engine.warm_up()
    before = engine.metrics.graph_hits
    requests = _submit(engine, load)
    steps = []
    started = perf_counter()
    while engine.has_work and perf_counter() - started < limit_s:
        is_decode = all(request.num_output > 0 for request in requests)
        step_started = perf_counter()
        engine.step()
        if is_decode and engine.has_work:
            steps.append(perf_counter() - step_started)
    wait(loaded.device)
    duration_s = perf_counter() - started
    num_tokens = sum(request.num_output for request in requests)
    hits = engine.metrics.graph_hits
    return OwnRun(
        tok_per_s=num_tokens / duration_s,
        step_s=median(steps) if steps else None,
        # The middle of the decode, where the median step is.
        context=load.num_prompt + load.num_output // 2,
        breakdown_ms=_break_down(loaded, load, limit_s / 4),
        graph_hits=None if hits is None else hits - (before or 0),
    )


def _break_down(loaded: LoadedModel, load: Load, limit_s: float) -> dict[str, float] | None:
    """Milliseconds of a decode step by part. Each part waits for the device, so the sum is more
    than an undisturbed step takes."""
    engine = _engine(loaded, load)
    engine.warm_up()
    requests = _submit(engine, load)
    started = perf_counter()
    while not all(request.num_output > 0 for request in requests):
        engine.step()
        if perf_counter() - started > limit_s:
            return None
    clock = _Clock(loaded.device)
    runner: Any = engine._runner
    scheduler: Any = engine._scheduler
    scheduler.schedule = clock.wrap("schedule", scheduler.schedule)
    if hasattr(runner, "_upload"):
        runner._upload = clock.wrap("inputs", runner._upload)
    runner._forward = clock.wrap("model", runner._forward)
    runner._choose = clock.wrap("sample", runner._choose)
    count = 0
    begun = perf_counter()
    while engine.has_work and count < 32 and perf_counter() - started < limit_s:
        engine.step()
        count += 1
    if count == 0:
        return None
    total = perf_counter() - begun
    parts = dict(clock.seconds)
    parts["model"] -= parts.get("inputs", 0.0)  # made within it
    parts["the rest"] = total - sum(parts.values())
    return {name: seconds / count * 1e3 for name, seconds in parts.items()}


def _engine(loaded: LoadedModel, load: Load) -> Engine:
    name = cuda_paged.ATTENTION_NAME if loaded.device.type == "cuda" else ATTENTION_NAME
    register(paged_attention)
    AttentionInterface.register(cuda_paged.ATTENTION_NAME, cuda_paged.cuda_attention)
    loaded.model.set_attn_implementation(name)
    tokens = load.num_prompt + load.num_output + 2 * _PAGE
    settings = ServerSettings(
        model=loaded.folder,
        device=str(loaded.device),
        prefix_cache=False,
        max_batch_size=load.concurrency,
        max_batched_tokens=max(512, 2 * load.concurrency),
        kv_tokens=(load.concurrency + 1) * tokens,
        admission_window_ms=0.0,
    )
    return build_engine(loaded, settings)


def _submit(engine: Engine, load: Load) -> list[Request]:
    params = SamplingParams(max_tokens=load.num_output, ignore_eos=True)
    requests = [Request(prompt, params) for prompt in load.prompts()]
    engine.submit(requests)
    return requests


class Peers:
    """transformers itself over the same weights."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self._device = loaded.device
        self._model.set_attn_implementation("sdpa")
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def run_static(self, load: Load, limit_s: float) -> float | NotMeasured:
        """Tokens per second of one generate() over the whole batch."""
        ids = torch.tensor(load.prompts(), device=self._device)
        mask = torch.ones_like(ids)
        options = {"attention_mask": mask, "do_sample": False, "max_time": limit_s}
        self._model.generate(ids, max_new_tokens=2, **options)
        wait(self._device)
        started = perf_counter()
        found = self._model.generate(ids, max_new_tokens=load.num_output, **options)
        wait(self._device)
        num_new = found.shape[1] - load.num_prompt
        return float(load.concurrency * num_new / (perf_counter() - started))

    def run_continuous(self, load: Load, limit_s: float) -> float | NotMeasured:
        """Tokens per second of continuous batching with a pool of exactly the size it needs."""
        tokens = load.num_prompt + load.num_output
        page = 256
        config = transformers.ContinuousBatchingConfig(
            num_blocks=load.concurrency * -(-tokens // page) + 8,
            max_batch_tokens=max(512, 2 * load.concurrency),
        )
        generation = transformers.GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=load.num_output
        )
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, block=True, timeout=10
        ) as manager:
            self._collect(manager, [[2] * 8], 2, limit_s)
            started = perf_counter()
            count = self._collect(manager, load.prompts(), load.num_output, limit_s)
            wait(self._device)
            duration_s = perf_counter() - started
        if count == 0:
            return NotMeasured(f"no request ended within {limit_s:.0f} s")
        return count / duration_s

    def _collect(
        self, manager: Any, prompts: list[list[int]], num_output: int, limit_s: float
    ) -> int:
        """Tokens of the requests that ended in time."""
        started = perf_counter()
        ids = {manager.add_request(prompt, max_new_tokens=num_output) for prompt in prompts}
        count = 0
        while ids and (left := limit_s - (perf_counter() - started)) > 0:
            result = manager.get_result(timeout=min(left, 5.0))
            if result is None:
                continue
            if result.error is not None:
                raise RuntimeError(f"continuous batching failed a request: {result.error}")
            if result.is_finished():
                ids.discard(result.request_id)
                count += len(result.generated_tokens)
        return count
