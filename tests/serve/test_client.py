"""The front's engine: text and stop strings, deaths, restarts and changes of weights.

The engine runs in a thread here, on its end of a real socket pair; test_server.py has processes.
"""

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quantgate_serve import client as client_module
from quantgate_serve.admission import QueueFullError
from quantgate_serve.client import EngineClient, EngineStoppedError, ModelRefusedError
from quantgate_serve.config import ServerSettings
from quantgate_serve.detokenize import TextStream
from quantgate_serve.engine import Engine
from quantgate_serve.engine_child import EngineChild, EngineThread
from quantgate_serve.request import Delta, FinishReason, Request
from quantgate_serve.runner import Collect
from quantgate_serve.scheduler import Chunk

MakeRequest = Callable[..., Request]
Generate = Callable[..., list[int]]


class Launched:
    """Launches engines in threads and keeps them, so that a test can end one."""

    def __init__(self) -> None:
        self.engines: list[EngineThread] = []

    def __call__(self, theirs: socket.socket) -> EngineThread:
        self.engines.append(EngineThread(theirs))
        return self.engines[-1]


def settings_for(folder: Path, **changes: Any) -> ServerSettings:
    values = {"device": "cpu", "threads": 1, "kv_tokens": 2048, "max_batch_size": 16} | changes
    return ServerSettings(model=folder, **values)


@asynccontextmanager
async def running(folder: Path, **changes: Any) -> AsyncIterator[tuple[EngineClient, Launched]]:
    launched = Launched()
    engine = EngineClient(settings_for(folder, **changes), launch=launched)
    await engine.start()
    await until(lambda: engine.is_warm)
    try:
        yield engine, launched
    finally:
        await engine.stop()


async def until(is_so: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():
            await asyncio.sleep(0.005)


async def complete(engine: EngineClient, requests: Sequence[Request]) -> list[list[Delta]]:
    """Submits and waits for every end; the deltas that each request's listener heard."""
    heard: list[list[Delta]] = [[] for _ in requests]
    for request, deltas in zip(requests, heard, strict=True):
        request.listener = deltas.append
    engine.submit(requests)
    await until(lambda: all(request.is_finished for request in requests))
    return heard


def decode(ids: Sequence[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


def test_tokens_equal_generate_and_each_end_is_heard_once(
    llama_folder: Path,
    make_request: MakeRequest,
    prompts: Callable[[int], list[list[int]]],
    generate: Generate,
) -> None:
    async def work() -> None:
        async with running(llama_folder) as (engine, _):
            requests = [make_request(prompt, num_logprobs=1) for prompt in prompts(12)]
            heard = await complete(engine, requests)
            for request, deltas in zip(requests, heard, strict=True):
                assert request.output_ids == generate(llama_folder, request.prompt_ids)
                assert [entry.token_id for entry in request.logprobs] == request.output_ids
                assert [delta.is_last for delta in deltas] == [True]
                assert 0 < request.arrived_ns <= request.scheduled_ns <= request.first_token_ns
            await engine.count()
            assert engine.metrics.finished == {"length": 12}
            assert engine.metrics.generation_tokens == 12 * 12

    asyncio.run(work())


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_stop_string_cuts_text_tokens_and_log_probabilities(
    is_streaming: bool, llama_folder: Path, make_request: MakeRequest
) -> None:
    async def work() -> None:
        async with running(llama_folder) as (engine, _):
            free = make_request([7, 8, 9], max_tokens=40)
            await complete(engine, [free])
            # Spans the boundary between the second and the third token.
            stop = decode(free.output_ids[1:3])[1:-1]
            request = make_request([7, 8, 9], max_tokens=40, stop=(stop,), num_logprobs=0)
            request.text = TextStream(decode, stop=[stop])
            request.is_streaming = is_streaming
            (deltas,) = await complete(engine, [request])
            assert request.output_ids == free.output_ids[:3]
            assert len(request.logprobs) == 3
            assert request.finish_reason is FinishReason.STOP
            text = decode(free.output_ids[:2])[: -len(str(free.output_ids[1])) - 1]
            assert request.text.text == text
            assert "".join(delta.text for delta in deltas) == text
            await until(lambda: engine.metrics.finished["stop"] == 1)
            assert engine.metrics.now.num_running == 0

    asyncio.run(work())


def test_a_stop_string_in_the_last_token_counts_as_a_stop(
    llama_folder: Path, make_request: MakeRequest
) -> None:
    async def work() -> None:
        async with running(llama_folder) as (engine, _):
            free = make_request([7, 8, 9], max_tokens=4)
            await complete(engine, [free])
            stop = decode(free.output_ids[3:])
            request = make_request([7, 8, 9], max_tokens=4, stop=(stop,))
            request.text = TextStream(decode, stop=[stop])
            await complete(engine, [request])
            at = decode(free.output_ids).index(stop)
            assert request.text.text == decode(free.output_ids)[:at]
            assert request.finish_reason is FinishReason.STOP

    asyncio.run(work())


def test_an_end_token_is_counted_and_is_no_text(
    llama_folder: Path, make_request: MakeRequest
) -> None:
    async def work() -> None:
        async with running(llama_folder) as (engine, _):
            free = make_request([7, 8, 9])
            await complete(engine, [free])
            third = free.output_ids[2]
            at = free.output_ids.index(third)
            request = make_request([7, 8, 9], ignore_eos=False)
            request.eos_ids = frozenset([third])
            request.text, request.is_streaming = TextStream(decode), True
            (deltas,) = await complete(engine, [request])
            assert request.output_ids == free.output_ids[: at + 1]
            assert "".join(delta.text for delta in deltas) == decode(free.output_ids[:at])
            assert request.ended_by_eos

    asyncio.run(work())


def test_an_abort_ends_at_once_and_frees_the_engine(
    llama_folder: Path, make_request: MakeRequest
) -> None:
    async def work() -> None:
        async with running(llama_folder, prefix_cache=False) as (engine, _):
            request = make_request([3] * 20, max_tokens=200)
            request.is_streaming = True
            heard: list[Delta] = []
            request.listener = heard.append
            engine.submit([request])
            await until(lambda: len(heard) > 1)
            engine.abort([request])
            assert request.finish_reason is FinishReason.ABORT
            await until(lambda: engine.metrics.finished["abort"] == 1)
            assert engine.metrics.now.kv_pages_used == 0
            count = len(heard)
            await complete(engine, [make_request([4])])
            assert len(heard) == count

    asyncio.run(work())


def test_an_aborted_request_is_in_no_step_that_begins_after_the_abort_arrived(
    llama_folder: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[list[int]]] = []
    launch = Engine._launch

    def record(self: Engine, plan: list[Chunk]) -> Collect:
        steps.append([chunk.request.prompt_ids for chunk in plan])
        return launch(self, plan)

    monkeypatch.setattr(Engine, "_launch", record)

    async def work() -> None:
        async with running(llama_folder) as (engine, _):
            other = make_request([4, 4], max_tokens=200)
            leaving = make_request([3, 3], max_tokens=200)
            engine.submit([leaving, other])
            await until(lambda: any([3, 3] in step and [4, 4] in step for step in steps))
            engine.abort([leaving])
            # The step under way, and one that began before the message came through the socket.
            allowed = len(steps) + 2
            await until(lambda: other.is_finished)
            assert len(steps) > allowed
            assert all([3, 3] not in step for step in steps[allowed:])

    asyncio.run(work())


def test_a_dead_engine_answers_everyone_and_is_started_again(
    llama_folder: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Engine._launch

    def take_a_while(self: Engine, plan: list[Chunk]) -> Collect:
        # So that nobody is done before the engine dies: its counts come ten times a second.
        time.sleep(0.005)
        return launch(self, plan)

    monkeypatch.setattr(Engine, "_launch", take_a_while)

    async def work() -> None:
        async with running(llama_folder, max_queued_requests=48) as (engine, launched):
            await complete(engine, [make_request([4], max_tokens=5)])
            # More than the batch takes, so that some die in the queue.
            requests = [make_request([3, 4, i + 5], max_tokens=200) for i in range(30)]
            heard: list[Delta] = []
            for request in requests:
                request.listener = heard.append
            engine.submit(requests)
            await until(lambda: engine.metrics.now.num_running > 0)
            launched.engines[0].kill()
            await until(lambda: not engine.is_warm)
            await until(lambda: len(heard) == 30)
            assert all(delta.is_last for delta in heard)
            assert {r.error.code for r in requests if r.error} == {"engine_failed"}
            assert all(request.error for request in requests)
            assert engine.is_alive
            with pytest.raises(EngineStoppedError, match="being restarted"):
                engine.submit([make_request([5])])
            await until(lambda: engine.is_warm)
            # The queue is empty again: as many as ever fit.
            again = [make_request([3, 4, i + 5], max_tokens=2) for i in range(30)]
            await complete(engine, again)
            assert all(request.error is None for request in again)
            await engine.count()
            metrics = engine.metrics
            assert metrics.finished == {"length": 31}
            assert metrics.generation_tokens >= 65
            assert metrics.now.num_running == 0
            assert engine.front.engine_restarts == 1

    asyncio.run(work())


def test_an_engine_that_dies_too_often_is_given_up(
    llama_folder: Path, make_request: MakeRequest
) -> None:
    async def work() -> None:
        async with running(llama_folder, max_engine_restarts=1) as (engine, launched):
            launched.engines[0].kill()
            await until(lambda: len(launched.engines) == 2 and engine.is_warm)
            launched.engines[1].kill()
            await until(lambda: engine.failure is not None)
            assert "died 2 times" in str(engine.failure)
            assert not engine.is_alive
            with pytest.raises(EngineStoppedError, match="start the server again"):
                engine.submit([make_request([5])])

    asyncio.run(work())


def test_an_engine_that_hangs_is_ended_and_started_again(
    llama_folder: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    launch = Engine._launch

    def hang(self: Engine, plan: list[Chunk]) -> Collect:
        if any(chunk.request.prompt_ids == [66, 66] for chunk in plan):
            release.wait(30)
        return launch(self, plan)

    monkeypatch.setattr(Engine, "_launch", hang)

    async def work() -> None:
        async with running(llama_folder, engine_timeout_s=1.0) as (engine, _):
            request = make_request([66, 66])
            await complete(engine, [request])
            assert request.error is not None
            assert request.error.code == "engine_failed"
            release.set()
            await until(lambda: engine.is_warm)
            await complete(engine, [make_request([5])])

    asyncio.run(work())


def test_an_idle_engine_may_be_silent(llama_folder: Path, make_request: MakeRequest) -> None:
    async def work() -> None:
        async with running(llama_folder, engine_timeout_s=0.2) as (engine, launched):
            await asyncio.sleep(0.6)
            await complete(engine, [make_request([5])])
            assert len(launched.engines) == 1

    asyncio.run(work())


def test_a_refused_model_is_refused_with_the_engines_reason(tmp_path: Path) -> None:
    async def work() -> None:
        engine = EngineClient(settings_for(tmp_path), launch=Launched())
        with pytest.raises(ModelRefusedError, match=r"has no config\.json"):
            await engine.start()
        await engine.stop()

    asyncio.run(work())


def test_a_full_queue_is_counted_here_and_freed_as_requests_start(
    llama_folder: Path, make_request: MakeRequest
) -> None:
    async def work() -> None:
        async with running(llama_folder, max_queued_requests=8, max_batch_size=2) as (engine, _):
            first = [make_request([i + 3]) for i in range(4)]
            task = asyncio.create_task(complete(engine, first))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                engine.submit([make_request([9]) for _ in range(5)])
            await task
            await complete(engine, [make_request([i + 3]) for i in range(4)])
            assert sum(engine.front.rejections.values()) == 1

    asyncio.run(work())


def test_a_request_for_an_idle_engine_is_not_counted_as_queued(
    llama_folder: Path, make_request: MakeRequest
) -> None:
    async def work() -> None:
        # No class has a whole request kept for it.
        async with running(llama_folder, max_queued_requests=3, max_batch_size=1) as (engine, _):
            alone, *others = (make_request([i + 3], max_tokens=100) for i in range(4))
            engine.submit([alone])
            assert alone.scheduled_ns >= alone.queued_ns > 0
            engine.submit(others)
            assert [request.scheduled_ns for request in others] == [0, 0, 0]
            with pytest.raises(QueueFullError):
                engine.submit([make_request([9])])
            # The engine may hear of all of them before its first step, when its queue is too short.
            await until(lambda: all(one.is_finished for one in (alone, *others)))
            assert [one.error for one in (alone, *others)] == [None] * 4
            assert alone.finished_ns <= others[0].first_token_ns

    asyncio.run(work())


@pytest.fixture
def other_folder(llama_folder: Path, tmp_path: Path) -> Path:
    """The same weights under another name."""
    folder = tmp_path / "other"
    shutil.copytree(llama_folder, folder)
    return folder


@pytest.mark.parametrize("refused", [None, "too little memory"])
def test_weights_change_under_load_and_no_request_fails(
    refused: str | None,
    llama_folder: Path,
    other_folder: Path,
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "fits_beside", lambda *_: refused)

    async def work() -> None:
        async with running(llama_folder) as (engine, launched):
            stop, requests = asyncio.Event(), []

            async def load() -> None:
                while not stop.is_set():
                    request = make_request([5, 6, len(requests) % 100 + 2], max_tokens=30)
                    requests.append(request)
                    await complete(engine, [request])

            clients = [asyncio.create_task(load()) for _ in range(6)]
            await until(lambda: len(requests) > 12)
            await engine.replace(settings_for(other_folder))
            assert engine.is_warm
            count = len(requests)
            await until(lambda: len(requests) > count + 12)
            stop.set()
            await asyncio.gather(*clients)
            assert [r.finish_reason for r in requests] == [FinishReason.LENGTH] * len(requests)
            assert (engine.settings.model, engine.epoch) == (other_folder, 1)
            await until(lambda: launched.engines[0].poll() == 0)
            await engine.count()
            assert engine.metrics.finished["length"] == len(requests)
            assert engine.front.engine_restarts == 0

    asyncio.run(work())


def test_a_deadline_holds_also_while_a_request_waits_for_the_next_engine(
    llama_folder: Path,
    other_folder: Path,
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "fits_beside", lambda *_: "too little memory")

    async def work() -> None:
        async with running(llama_folder, engine_timeout_s=0.2) as (engine, _):
            drained = asyncio.Event()
            drain = EngineChild.drain

            async def drain_later(child: EngineChild) -> None:
                await drained.wait()
                await drain(child)

            monkeypatch.setattr(EngineChild, "drain", drain_later)
            task = asyncio.create_task(engine.replace(settings_for(other_folder)))
            await asyncio.sleep(0)
            patient, hurried = make_request([5]), make_request([6])
            hurried.deadline_ns = time.perf_counter_ns() + 50_000_000
            (heard,) = await complete(engine, [hurried])
            assert hurried.error is not None
            assert hurried.error.code == "deadline_exceeded"
            assert [delta.is_last for delta in heard] == [True]
            assert not task.done()
            waiting = asyncio.create_task(complete(engine, [patient]))
            await asyncio.sleep(0)
            drained.set()
            await task
            await waiting
            assert (patient.error, len(patient.output_ids)) == (None, 12)
            assert engine.front.expired == 1

    asyncio.run(work())


@pytest.mark.parametrize("refused", [None, "too little memory"])
def test_weights_that_cannot_be_served_leave_the_old_ones_serving(
    refused: str | None,
    llama_folder: Path,
    tmp_path: Path,
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "fits_beside", lambda *_: refused)

    async def work() -> None:
        async with running(llama_folder) as (engine, _):
            task = asyncio.create_task(engine.replace(settings_for(tmp_path)))
            await asyncio.sleep(0)
            during = make_request([5, 6], max_tokens=30)
            await complete(engine, [during])
            with pytest.raises(ModelRefusedError, match=r"has no config\.json"):
                await task
            assert engine.is_warm
            await complete(engine, [make_request([5])])
            assert engine.settings.model == llama_folder
            assert during.error is None
            assert engine.failure is None

    asyncio.run(work())


def test_two_replacements_at_once_are_refused(llama_folder: Path, other_folder: Path) -> None:
    async def work() -> None:
        async with running(llama_folder) as (engine, _):
            first = asyncio.create_task(engine.replace(settings_for(other_folder)))
            await asyncio.sleep(0)
            with pytest.raises(EngineStoppedError, match="under way"):
                await engine.replace(settings_for(other_folder))
            await first

    asyncio.run(work())
