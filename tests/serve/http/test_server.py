"""A real child process, and real clients: what a user of the server meets."""

import asyncio
import gc
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from quantgate_serve.__main__ import main
from quantgate_serve.config import sha256_of

Generate = Callable[..., list[int]]
PROMPT = "the order desk takes 3 nuts"


@contextmanager
def server(work: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A child process, from listening until it is stopped."""
    ready_file = work / "ready.json"
    with (work / "log").open("wb") as log:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "quantgate_serve", *options),
                *("--port", "0", "--ready-file", str(ready_file), "--device", "cpu"),
                *("--threads", "1", "--served-model-name", "tiny"),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 180
        while not ready_file.exists():
            assert child.poll() is None, (work / "log").read_text()
            assert time.monotonic() < deadline, "not listening after three minutes"
            time.sleep(0.05)
        written = json.loads(ready_file.read_text())
        assert written["pid"] == child.pid
        yield child, written["url"]
    finally:
        child.kill()
        child.wait()


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 30
    while httpx.get(f"{url}/ready").status_code != 200:
        assert time.monotonic() < deadline, "not ready after half a minute"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def url(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = ("--kv-tokens", "512", "--max-queued-requests", "40", "--max-body-bytes", "20000")
    model = ("--model", str(llama_folder))
    with server(tmp_path_factory.mktemp("server"), *model, *options) as (_, found):
        wait_until_ready(found)
        yield found


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(url: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json={"model": "tiny"} | body, timeout=60)


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"quantgate_{name}{{"))


def test_the_openai_client_completes_as_generate_does(
    client: openai.OpenAI, llama_folder: Path, generate: Generate, tokenizer: Any
) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    ids = generate(llama_folder, tokenizer.encode(PROMPT), max_tokens=8)
    assert answer.choices[0].text == tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_many_clients_at_once_get_the_tokens_of_generate(
    url: str,
    prompts: Callable[[int], list[list[int]]],
    llama_folder: Path,
    generate: Generate,
) -> None:
    async def ask() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(timeout=60) as http:
            answers = await asyncio.gather(
                *(
                    http.post(
                        f"{url}/v1/completions",
                        json={
                            "prompt": prompt,
                            "max_tokens": 10,
                            "temperature": 0,
                            "ignore_eos": True,
                            "return_token_ids": True,
                        },
                    )
                    for prompt in prompts(24)
                )
            )
        return [answer.json()["choices"][0] for answer in answers]

    for prompt, choice in zip(prompts(24), asyncio.run(ask()), strict=True):
        assert choice["prompt_token_ids"] == prompt
        assert choice["token_ids"] == generate(llama_folder, prompt, max_tokens=10)


def test_a_list_of_prompts_and_n_give_choices_in_order(url: str) -> None:
    answer = post(url, prompt=[[5, 6], [7, 8, 9]], n=2, max_tokens=3, seed=1).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": sum(
            len(choice["token_ids"])
            for choice in post(
                url, prompt=[[5, 6], [7, 8, 9]], n=2, max_tokens=3, seed=1, return_token_ids=True
            ).json()["choices"]
        ),
        "total_tokens": answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"],
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_echo_with_prompt_logprobs_scores_a_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    tokens, values = choice.logprobs.tokens, choice.logprobs.token_logprobs
    assert tokens is not None
    assert values is not None
    assert "".join(tokens) == PROMPT
    assert values[0] is None
    assert all(value < 0 for value in values[1:])
    assert choice.logprobs.text_offset == [len("".join(tokens[:i])) for i in range(len(tokens))]


def test_tokens_of_log_probabilities_can_be_named_by_their_ids(url: str) -> None:
    ids = [5, 6, 7]
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 20}
    by_id = post(url, **body, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert by_id["tokens"][:3] == [f"token_id:{token}" for token in ids]
    for named in by_id["top_logprobs"][1:]:
        # Of tokens with the same text only one has a place where texts name them.
        assert len(named) >= 20
        assert all(name.removeprefix("token_id:").isdigit() for name in named)
    by_text = post(url, **body).json()["choices"][0]["logprobs"]
    assert by_text["token_logprobs"] == by_id["token_logprobs"]


def test_log_probabilities_of_chosen_ids_come_back_by_id(url: str) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    choice = post(url, **body, logprob_token_ids=[9, 4]).json()["choices"][0]
    positions = choice["logprobs"]["token_id_logprobs"]
    assert [list(position) for position in positions] == [["9", "4"]] * 2
    top = post(url, **body, logprobs=20).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    assert max(positions[0].values()) <= max(top.values())


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=20,
            temperature=1,
            seed=3,
            extra_body={"ignore_eos": True},
            **options,
        )

    whole = ask().choices[0]
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.text for part in parts) == whole.text
    assert [part.finish_reason for part in parts if part.finish_reason] == [whole.finish_reason]
    assert chunks[-1].usage.completion_tokens == 20


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("echo", [False, True])
def test_the_log_probabilities_of_a_stream_add_up_to_the_whole(
    url: str, echo: bool, max_tokens: int
) -> None:
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    asked = {**body, "echo": echo, "logprobs": 2, "logprob_token_ids": [4]}
    whole = post(url, **asked).json()["choices"][0]["logprobs"]
    with httpx.stream("POST", f"{url}/v1/completions", json={**asked, "stream": True}) as answer:
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    parts = [json.loads(one)["choices"][0]["logprobs"] for one in data if one != "[DONE]"]
    for name, values in whole.items():
        assert [value for part in parts if part for value in part[name]] == values, name


def test_chat_answers_and_streams(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "3 nuts"}]

    def ask(**options: Any) -> Any:
        return client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=6,
            temperature=0,
            extra_body={"ignore_eos": True},
            **options,
        )

    whole = ask(logprobs=True, top_logprobs=2).choices[0]
    assert whole.message.role == "assistant"
    assert len(whole.logprobs.content) == 6
    assert len(whole.logprobs.content[0].top_logprobs) == 2
    deltas = [chunk.choices[0].delta for chunk in ask(stream=True)]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.message.content


def test_a_stop_string_is_cut_from_the_text(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True},
            **options,
        ).choices[0]

    text = ask().text
    stop = text[4:6]
    stopped = ask(stop=[stop])
    assert stopped.text == text[: text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert ask().stop_reason is None


def test_timings_tell_a_request_s_life(url: str) -> None:
    timings = post(url, prompt=[5, 6], max_tokens=4, ignore_eos=True).json()["timings"]
    assert set(timings) == {"queue_ms", "prefill_ms", "decode_ms", "ttft_ms"}
    assert timings["ttft_ms"] == pytest.approx(timings["queue_ms"] + timings["prefill_ms"])
    assert timings["decode_ms"] > 0


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": "a", "model": "other"}, 404, "model_not_found"),
        ({"prompt": "a", "temperature": -1}, 400, "invalid_value"),
        ({"prompt": [5], "max_tokens": 256}, 400, "context_length_exceeded"),
        ({"prompt": [99999]}, 400, "invalid_value"),
        ({"prompt": ""}, 400, "invalid_value"),
        ({"prompt": "a", "logprob_token_ids": [-1]}, 400, "invalid_value"),
        ({"prompt": "a" * 30_000}, 413, "request_too_large"),
        ({"prompt": [5], "max_tokens": 256, "stream": True}, 400, "context_length_exceeded"),
        ({"prompt": [[5]] * 26}, 400, "too_many_at_once"),
        (
            {"prompt": [[5]], "n": 5, "logprob_token_ids": [7] * 1024, "max_tokens": 110},
            400,
            "invalid_value",
        ),
    ],
)
def test_a_refusal_has_openais_form(url: str, body: dict[str, Any], status: int, code: str) -> None:
    answer = post(url, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "retry-after" not in answer.headers  # it would be refused again


def test_other_routes_and_methods_are_refused_in_the_same_form(url: str) -> None:
    error = httpx.get(f"{url}/v1/nothing").json()["error"]
    assert error["message"] == "there is no path /v1/nothing here; /openapi.json lists all."
    assert httpx.get(f"{url}/v1/completions").status_code == 405
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_client_that_leaves_frees_its_pages(url: str) -> None:
    used = metric(url, "kv_cache_usage_perc")
    aborted = metric(url, "request_success_total")
    body = {"prompt": [3] * 40, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        next(response.iter_lines())
    # More than have pages at once: they are not through before the client loses its patience.
    several = body | {"stream": False, "n": 8, "temperature": 1.0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=several, timeout=0.03)
    deadline = time.monotonic() + 10
    while metric(url, "request_success_total") < aborted + 2:
        assert time.monotonic() < deadline, "the requests were not ended"
        time.sleep(0.05)
    assert metric(url, "num_requests_running") == 0
    # The prompt's pages stay in the prefix cache, the output's do not.
    assert metric(url, "kv_cache_usage_perc") <= used + 40 / 512 + 0.4


def test_metrics_have_the_names_that_dashboards_read(url: str) -> None:
    text = httpx.get(f"{url}/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "request_queue_time_seconds_bucket",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "generation_tokens_total",
        "prompt_tokens_total",
        "batch_size_bucket",
        "step_time_seconds_bucket",
        "oom_total",
        "oom_retry_total",
        "peak_memory_bytes",
        "kv_cache_usage_perc",
    ):
        assert f"quantgate_{name}{{" in text
    assert 'quantgate_request_queue_time_seconds_bucket{le="0.001"' in text
    assert metric(url, "peak_memory_bytes") > 1e7


def promote(llama_folder: Path, root: Path) -> Path:
    """A serving.yaml whose champion is a copy of the tiny model."""
    folder = root / "variant"
    shutil.copytree(llama_folder, folder)
    champion = {
        "name": "bf16",
        "path": "variant",
        "scheme": "bf16",
        "artifact_sha256": "0" * 64,
        "files": {path.name: sha256_of(path) for path in folder.iterdir()},
        "release": "r1",
        "verdicts_sha256": "0" * 64,
        "promoted_at": "2026-11-24T00:00:00Z",
    }
    config = root / "serve" / "serving.yaml"
    config.parent.mkdir()
    config.write_text(yaml.safe_dump({"model_name": "demo", "champion": champion}))
    return config


class Collector(ThreadingHTTPServer):
    """Takes spans, as a collector of OpenTelemetry does."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), Collecting)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Collecting(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        packed = self.headers.get("content-encoding") == "gzip"
        self.server.bodies.append(gzip.decompress(body) if packed else body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@dataclass(frozen=True)
class Drained:
    """What is left of a champion that was served until a termination."""

    code: int
    last: dict[str, Any]
    """The last event of the answer that was under way at the termination."""
    spans: list[bytes]


def can_send_spans() -> bool:
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def drained(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Drained:
    """A traced request and one that is under way at the end; spans where they can be sent."""
    work = tmp_path_factory.mktemp("drained")
    options = ["--config", str(promote(llama_folder, work))]
    collector = Collector()
    if can_send_spans():
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        options += ["--otlp-traces-endpoint", endpoint]
    with server(work, *options) as (child, url):
        wait_until_ready(url)
        traced = httpx.post(
            f"{url}/v1/completions",
            json={"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True},
            headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
            timeout=60,
        )
        assert traced.status_code == 200
        body = {"prompt": [3] * 20, "max_tokens": 230, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as last:
            lines = last.iter_lines()
            next(lines)  # it has begun
            child.send_signal(signal.SIGTERM)
            *_, usage, end = [line for line in lines if line]
        code = child.wait(timeout=30)
    collector.shutdown()
    collector.server_close()
    assert end == "data: [DONE]"
    return Drained(code, json.loads(usage.removeprefix("data: ")), collector.bodies)


def test_the_champion_is_served_and_a_termination_drains(drained: Drained) -> None:
    assert drained.last["usage"]["completion_tokens"] == 230
    assert drained.code == 0


def test_spans_of_real_requests_reach_a_collector_also_those_left_at_the_end(
    drained: Drained,
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp", reason="the extra otel is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    names: dict[str, list[str]] = defaultdict(list)
    for body in drained.spans:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    names[span.trace_id.hex()].append(span.name)
    expected = ["decode", "prefill", "queue", "text_completion tiny"]
    assert sorted(names.pop(TRACE)) == expected
    assert [sorted(others) for others in names.values()] == [expected]


def test_a_drain_has_a_bound(llama_folder: Path, tmp_path: Path) -> None:
    options = ("--model", str(llama_folder), "--drain-timeout-s", "0")
    with server(tmp_path, *options) as (child, url):
        wait_until_ready(url)
        body = {"prompt": [3] * 20, "max_tokens": 230, "ignore_eos": True, "n": 64}
        asking = threading.Thread(target=lambda: _ignore_loss(url, body))
        asking.start()
        while metric(url, "num_requests_running") == 0:
            assert asking.is_alive(), "it was over before it was seen to run"
            time.sleep(0.005)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=15) == 0
        asking.join(timeout=15)


def _ignore_loss(url: str, body: dict[str, Any]) -> None:
    try:
        post(url, **body)
    except httpx.HTTPError:
        return


def test_a_champion_with_other_bytes_is_refused(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving_config = promote(llama_folder, tmp_path)
    weights = tmp_path / "variant" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    assert main(["--config", str(serving_config)]) == 2
    assert "model.safetensors has sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nonexistent"], "has no config.json"),
        (["--model", ".", "--port", "70000"], "--port 70000: "),
        (["--model", ".", "--max-batch-size", "0"], "--max-batch-size 0: "),
        (["--config", "/nonexistent/serving.yaml"], "cannot be read"),
    ],
)
def test_a_refused_start_is_code_2_and_a_reason(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(options) == 2
    gc.collect()  # a task whose error nobody took says so when it goes
    assert message in capsys.readouterr().err
    assert "Traceback" not in caplog.text


def test_each_request_leaves_its_life_in_order_for_who_asks_on_this_machine(url: str) -> None:
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, "stream": True},
        timeout=60,
    ) as answer:
        answer.read()
    post(url, prompt=[5, 6, 7], max_tokens=3, ignore_eos=True)
    told = httpx.get(f"{url}/debug/requests").json()["requests"]
    whole, streamed = told[0], told[1]
    assert (whole["prompt_tokens"], whole["output_tokens"]) == (3, 3)
    assert (streamed["output_tokens"], streamed["finish_reason"]) == (6, "length")
    for life in (whole, streamed):
        stations = ("tokenized", "queued", "admitted", "first_token", "last_token", "finished")
        times = [life[f"{station}_ms"] for station in stations]
        assert times == sorted(times), life
    page = httpx.get(f"{url}/debug/requests", headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")


def test_a_request_that_its_client_left_has_a_life_too(url: str) -> None:
    body = {"prompt": [9, 8, 7], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 10
    while True:
        life = httpx.get(f"{url}/debug/requests").json()["requests"][0]
        if life["finish_reason"] is not None:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert life["finish_reason"] == "abort"
    assert life["first_token_ms"] is not None


def test_spans_cannot_be_asked_for_without_their_packages(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sdk.trace", "exporter.otlp.proto.http.trace_exporter"):
        monkeypatch.setitem(sys.modules, f"opentelemetry.{name}", None)
    collector = "http://127.0.0.1:1/v1/traces"
    options = ["--model", str(llama_folder), "--port", "0", "--device", "cpu"]
    assert main([*options, "--otlp-traces-endpoint", collector]) == 2
    assert "pip install 'quantgate[otel]'" in capsys.readouterr().err
    # It rests while a server loads, and whoever called goes on.
    assert gc.isenabled()
