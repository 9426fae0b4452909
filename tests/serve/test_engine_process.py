"""The server as two processes: what is left when one of them is killed."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import transformers
import yaml

from quantgate_serve.config import sha256_of


@contextmanager
def served(work: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server process, ready, until it is killed."""
    ready_file, log = work / "ready.json", work / "log"
    with log.open("wb") as out:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "quantgate_serve", "--port", "0", "--device", "cpu"),
                *("--ready-file", str(ready_file), "--threads", "1", *options),
            ],
            stdout=out,
            stderr=out,
            # Each import of both processes is a line of the log.
            env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        )
    try:
        wait(ready_file.exists, child, log)
        url = json.loads(ready_file.read_text())["url"]
        wait(lambda: is_ready(url), child, log)
        yield child, url
    finally:
        child.kill()
        child.wait()


def wait(is_so: Callable[[], bool], child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not is_so():
        assert child.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def is_ready(url: str) -> bool:
    return httpx.get(f"{url}/ready").status_code == 200


def engine_of(server: subprocess.Popen[bytes]) -> psutil.Process:
    (engine,) = psutil.Process(server.pid).children()
    assert "quantgate_serve.engine_process" in engine.cmdline()
    return engine


def torch_libraries(process: psutil.Process) -> list[str]:
    """The parts of torch that `process` has mapped."""
    return [found.path for found in process.memory_maps() if "libtorch" in found.path]


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"quantgate_{name}{{"))


class Promoted:
    """A serving.yaml whose champion is a copy of the tiny model."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.source = root, source
        self.path = root / "serve" / "serving.yaml"
        self.path.parent.mkdir()

    def promote(self, name: str, digit: str) -> Path:
        folder = Path(shutil.copytree(self.source, self.root / name))
        champion = {
            "name": name,
            "path": name,
            "scheme": "bf16",
            "artifact_sha256": digit * 64,
            "files": {path.name: sha256_of(path) for path in folder.iterdir()},
            "release": "r1",
            "verdicts_sha256": "0" * 64,
            "promoted_at": "2026-11-24",
        }
        new = self.path.with_suffix(".new")
        new.write_text(yaml.safe_dump({"model_name": "demo", "champion": champion}))
        new.replace(self.path)
        return folder


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Promoted:
    made = Promoted(tmp_path_factory.mktemp("promoted"), llama_folder)
    made.promote("first", "0")
    return made


@pytest.fixture(scope="module")
def server_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def server(promoted: Promoted, server_log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with served(server_log.parent, "--config", str(promoted.path)) as found:
        yield found


async def ask(http: httpx.AsyncClient, url: str, **body: Any) -> tuple[int, str]:
    """Status and whole text of an answer."""
    body = {"prompt": [3, 4, 5], "ignore_eos": True} | body
    answer = await http.post(f"{url}/v1/completions", json=body, timeout=60)
    return answer.status_code, answer.text


def test_the_front_has_no_torch_and_the_engine_no_torchao(
    server: tuple[subprocess.Popen[bytes], str], server_log: Path
) -> None:
    child, _ = server
    assert torch_libraries(engine_of(child))
    assert not torch_libraries(psutil.Process(child.pid))
    imports = {line.split("|")[-1].strip() for line in server_log.read_text().splitlines()}
    assert {"torch", "transformers.quantizers", "quantgate_serve.http.app"} <= imports
    assert not {"torchao", "scipy"} & imports


def test_a_killed_engine_answers_everyone_and_comes_back(
    server: tuple[subprocess.Popen[bytes], str],
) -> None:
    child, url = server
    engine = engine_of(child)
    counted = metric(url, "generation_tokens_total")

    async def load() -> tuple[list[tuple[int, str]], list[int]]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as http:
            asked = [
                asyncio.create_task(ask(http, url, max_tokens=240, n=2, stream=i % 2 == 0))
                for i in range(60)
            ]
            while metric(url, "num_requests_running") == 0:
                await asyncio.sleep(0.005)
            engine.send_signal(signal.SIGKILL)
            answers = await asyncio.gather(*asked)
            while (await http.get(f"{url}/ready")).status_code == 200:
                await asyncio.sleep(0.005)
            healths = []
            while (await http.get(f"{url}/ready")).status_code != 200:
                healths.append((await http.get(f"{url}/health")).status_code)
                await asyncio.sleep(0.05)
            return list(answers), healths

    answers, healths = asyncio.run(load())
    streams, wholes = answers[::2], answers[1::2]
    assert {status for status, _ in wholes} == {503}
    assert all(json.loads(text)["error"]["code"] == "engine_failed" for _, text in wholes)
    for status, text in streams:
        assert status in (200, 503)
        if status == 200:
            *_, error, done = [line for line in text.splitlines() if line]
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_failed"
            assert done == "data: [DONE]"
    # The server heals itself, so it is not to be restarted from outside.
    assert set(healths) == {200}
    assert engine_of(child).pid != engine.pid
    body = {"prompt": [5], "max_tokens": 4, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert metric(url, "engine_restarts_total") == 1
    assert metric(url, "num_requests_running") == 0
    assert metric(url, "num_requests_waiting") == 0
    assert metric(url, "generation_tokens_total") > counted


def test_a_client_that_leaves_takes_its_request_out_of_the_engine(
    server: tuple[subprocess.Popen[bytes], str],
) -> None:
    _, url = server
    before = metric(url, "kv_cache_usage_perc")
    body = {"prompt": [3] * 40, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 10
    while metric(url, "num_requests_running") or metric(url, "kv_cache_usage_perc") > before:
        assert time.monotonic() < deadline, "its pages are still held"
        time.sleep(0.01)


def test_peak_memory_is_that_of_both_processes(
    server: tuple[subprocess.Popen[bytes], str],
) -> None:
    child, url = server
    resident = psutil.Process(child.pid).memory_info().rss + engine_of(child).memory_info().rss
    assert metric(url, "peak_memory_bytes") >= resident


@pytest.mark.parametrize(
    ("how", "digit"),
    [("route", "1"), pytest.param("signal", "2", marks=pytest.mark.slow), ("file", "3")],
)
def test_promoted_weights_are_taken_over_under_load(
    how: str, digit: str, promoted: Promoted, server: tuple[subprocess.Popen[bytes], str]
) -> None:
    child, url = server
    engine = engine_of(child)

    async def load() -> list[tuple[int, str]]:
        answers: list[tuple[int, str]] = []
        stop = asyncio.Event()

        async def client(http: httpx.AsyncClient) -> None:
            while not stop.is_set():
                answers.append(await ask(http, url, max_tokens=30))

        async with httpx.AsyncClient() as http:
            clients = [asyncio.create_task(client(http)) for _ in range(4)]
            folder = promoted.promote(f"variant-{digit}", digit)
            if how == "route":
                answer = await http.post(f"{url}/admin/reload", timeout=120)
                assert (answer.status_code, answer.json()["model"]) == (200, str(folder))
            elif how == "signal":
                child.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 120
            while await asyncio.to_thread(engine.is_running):
                assert time.monotonic() < deadline, "the old engine still serves"
                await asyncio.sleep(0.05)
            stop.set()
            await asyncio.gather(*clients)
        return answers

    answers = asyncio.run(load())
    assert answers
    assert {status for status, _ in answers} == {200}
    assert is_ready(url)
    assert engine_of(child).pid != engine.pid


def test_weights_with_other_bytes_are_refused_and_the_old_ones_serve(
    promoted: Promoted, server: tuple[subprocess.Popen[bytes], str]
) -> None:
    child, url = server
    engine = engine_of(child)
    weights = promoted.promote("spoilt", "9") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    answer = httpx.post(f"{url}/admin/reload", timeout=60)
    # 409 again when the change of the file was noticed first.
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "reload_refused"
    assert engine_of(child).pid == engine.pid
    assert is_ready(url)


def test_the_engine_ends_with_a_server_that_is_killed(
    server: tuple[subprocess.Popen[bytes], str],
) -> None:
    # The last test of this server.
    child, url = server
    engine = engine_of(child)
    body = {"prompt": [3], "max_tokens": 200, "ignore_eos": True, "n": 16, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
        os.kill(child.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([engine], timeout=20)
    assert alive == []


def test_a_server_whose_engine_dies_too_often_exits_with_1(
    llama_folder: Path, tmp_path: Path
) -> None:
    with served(tmp_path, "--model", str(llama_folder), "--max-engine-restarts", "0") as (child, _):
        engine_of(child).kill()
        assert child.wait(timeout=60) == 1
    assert "Giving up" in (tmp_path / "log").read_text()


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    """A start that fails."""
    command = (sys.executable, "-m", "quantgate_serve", "--model", str(folder))
    return subprocess.run(
        [*command, "--port", "0", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_model_that_the_engine_refuses_is_one_message_and_code_2(
    save_model: Callable[..., Path], config_of: Callable[..., Any]
) -> None:
    done = start(save_model(config_of(transformers.MistralConfig, sliding_window=64)))
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if " INFO " not in text]
    assert line.startswith("error: ")
    assert "uses sliding-window attention (window 64)" in line


def test_an_engine_that_fails_while_it_loads_is_not_said_to_be_killed(
    llama_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(b"")
    done = start(folder)
    assert done.returncode == 1
    (line,) = [text for text in done.stderr.splitlines() if " ERROR " in text]
    assert line.endswith("while it loaded the model; see its log.")
    assert "SIGKILL" not in line


def test_without_a_process_of_its_own_the_engine_serves_from_a_thread(
    llama_folder: Path, tmp_path: Path
) -> None:
    options = ("--model", str(llama_folder), "--no-engine-process")
    with served(tmp_path, *options) as (child, url):
        assert psutil.Process(child.pid).children() == []
        body = {"prompt": [5], "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert answer.json()["usage"]["completion_tokens"] == 4
        child.terminate()
        assert child.wait(timeout=30) == 0
