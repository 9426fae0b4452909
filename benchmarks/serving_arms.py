"""The arms of the serving benchmark: each runs the same requests over the same weights."""

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import transformers
from serving_workload import BenchRequest, num_output

from quantgate_serve.config import ServerSettings
from quantgate_serve.http.responses import timings
from quantgate_serve.loading import LoadedModel
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.startup import build_engine, load_for_serving

_HERE = Path(__file__).parent
_READY_S = 120.0
# One request to its seconds and the server's own account of them (latency_s, timings).
Ask = Callable[[BenchRequest], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One run of one arm. `outputs` holds each request's tokens where the arm gives them.

    `cpu_s` is the CPU time of all threads, where the arm runs in this process and says it.
    """

    num_tokens: int
    duration_s: float
    outputs: list[list[int]] | None = None
    mean_batch: float | None = None
    cpu_s: float | None = None

    @property
    def tok_per_s(self) -> float:
        return self.num_tokens / self.duration_s


def load_reference(folder: Path) -> Any:
    """The model as plain transformers loads it, for the arms that are not ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.inference_mode()
def run_static(model: Any, requests: Sequence[BenchRequest], *, batch_size: int) -> ArmResult:
    """generate() over batches in order of arrival; a batch runs until its longest is done."""
    outputs: list[list[int]] = []
    started = perf_counter()
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        width = max(len(request.prompt) for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(request.num_output for request in batch),
            do_sample=False,
        )
        outputs += [
            found[row, width : width + request.num_output].tolist()
            for row, request in enumerate(batch)
        ]
    return ArmResult(num_output(list(requests)), perf_counter() - started, outputs)


def run_continuous(
    model: Any, requests: Sequence[BenchRequest], *, num_blocks: int, max_batch_tokens: int
) -> ArmResult:
    """transformers' continuous batching; every request handed in before the clock starts.

    Raises:
        RuntimeError: a request failed or gave another number of tokens than was asked for.
    """
    config = transformers.ContinuousBatchingConfig(
        num_blocks=num_blocks, max_batch_tokens=max_batch_tokens
    )
    generation = transformers.GenerationConfig(
        do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=256
    )
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, block=True, timeout=10
    ) as manager:
        started = perf_counter()
        for index, request in enumerate(requests):
            manager.add_request(
                request.prompt, request_id=str(index), max_new_tokens=request.num_output
            )
        outputs: dict[int, list[int]] = {}
        while len(outputs) < len(requests):
            result = manager.get_result(timeout=60)
            if result is None or result.error is not None:
                raise RuntimeError(
                    f"continuous batching lost a request: {result.error if result else 'no answer'}"
                )
            if result.is_finished():
                outputs[int(result.request_id)] = list(result.generated_tokens)
        duration_s = perf_counter() - started
    for index, request in enumerate(requests):
        if len(outputs[index]) != request.num_output:
            raise RuntimeError(
                f"request {index} gave {len(outputs[index])} tokens, not {request.num_output}"
            )
    ordered = [outputs[index] for index in range(len(requests))]
    return ArmResult(num_output(list(requests)), duration_s, ordered)


class OwnEngine:
    """Our engine in this process, stepped by hand."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.loaded: LoadedModel = load_for_serving(settings.model, settings)
        self.run([BenchRequest([1, 2, 3], 4), BenchRequest([1, 2, 3, 4], 4)])

    def run(self, requests: Sequence[BenchRequest]) -> ArmResult:
        """A fresh engine each time, so that no arm finds another's prefixes in the cache."""
        engine = build_engine(self.loaded, self.settings)
        asked = [_to_request(request) for request in requests]
        started, cpu_s = perf_counter(), process_time()
        engine.submit(asked)
        while engine.has_work:
            engine.step()
        duration_s, cpu_s = perf_counter() - started, process_time() - cpu_s
        for request in asked:
            if request.error is not None:
                raise RuntimeError(f"our engine failed a request: {request.error.message}")
        sizes = engine.metrics.batch_size
        return ArmResult(
            sum(request.num_output for request in asked),
            duration_s,
            [request.output_ids for request in asked],
            sizes.sum / max(1, sum(sizes.counts)),
            cpu_s,
        )

    def one_by_one(self) -> Ask:
        """Computes a request alone on the idle engine; gives what the client of a server would."""
        engine = build_engine(self.loaded, self.settings)

        def ask(request: BenchRequest) -> dict[str, Any]:
            asked = _to_request(request)
            started = perf_counter()
            engine.submit([asked])
            while engine.has_work:
                engine.step()
            return {"latency_s": perf_counter() - started, "timings": timings([asked])}

        return ask


def _to_request(request: BenchRequest) -> Request:
    return Request(request.prompt, SamplingParams(max_tokens=request.num_output, ignore_eos=True))


@dataclass(frozen=True, slots=True)
class OwnServer:
    """Our HTTP server as a child process."""

    url: str
    pid: int
    model_name: str

    def run(self, requests: Sequence[BenchRequest], *, stream: bool) -> ArmResult:
        """All requests at once, from a client in a process of its own."""
        answer = self._ask(requests, stream=stream)
        expected = num_output(list(requests))
        if answer["num_output"] != expected:
            raise RuntimeError(f"the server gave {answer['num_output']} tokens, not {expected}")
        return ArmResult(expected, answer["duration_s"])

    @contextlib.contextmanager
    def one_by_one(self) -> Iterator[Ask]:
        """Sends a request and waits for its answer, over one connection."""
        client = subprocess.Popen(
            [sys.executable, str(_HERE / "serving_client.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with client, client.stdin as asking, client.stdout as answers:  # type: ignore[union-attr]

            def write(value: dict[str, Any]) -> None:
                asking.write(json.dumps(value) + "\n")
                asking.flush()

            def ask(request: BenchRequest) -> dict[str, Any]:
                write(asdict(request))
                answer: dict[str, Any] = json.loads(answers.readline())
                return answer

            write({"url": self.url, "model": self.model_name, "stream": False})
            yield ask

    def _ask(self, requests: Sequence[BenchRequest], *, stream: bool) -> dict[str, Any]:
        job = {
            "url": self.url,
            "model": self.model_name,
            "stream": stream,
            "requests": [asdict(request) for request in requests],
        }
        return ask_client(job)


def ask_client(job: dict[str, Any]) -> dict[str, Any]:
    """What the client process measured for `job`."""
    done = subprocess.run(
        [sys.executable, str(_HERE / "serving_client.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the client failed: {done.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@contextlib.contextmanager
def start_server(settings: ServerSettings, ready_file: Path) -> Iterator[OwnServer]:
    """The server that a user starts, with `settings`; stopped at the end.

    Raises:
        RuntimeError: it did not become ready.
    """
    ready_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "quantgate_serve", "--model", str(settings.model)]
    command += ["--port", "0", "--ready-file", str(ready_file), "--device", "cpu"]
    command += ["--no-coalescing"]  # every arm computes every request
    command += ["--max-batch-size", str(settings.max_batch_size)]
    command += ["--max-batched-tokens", str(settings.max_batched_tokens)]
    if settings.threads is not None:
        command += ["--threads", str(settings.threads)]
    if not settings.prefix_cache:
        command.append("--no-prefix-cache")
    log_path = ready_file.with_suffix(".log")
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = perf_counter() + _READY_S
        while not (ready_file.is_file() and _is_ready(ready_file)):
            if process.poll() is not None or perf_counter() > end:
                raise RuntimeError(f"the server did not start:\n{log_path.read_text()[-2000:]}")
            time.sleep(0.1)
        url = json.loads(ready_file.read_text(encoding="utf-8"))["url"]
        yield OwnServer(url, process.pid, settings.model_name)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(ready_file: Path) -> bool:
    url = json.loads(ready_file.read_text(encoding="utf-8"))["url"]
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
