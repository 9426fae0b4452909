"""A fake server process: its HTTP side in a thread here, its process one that a test can end."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from quantgate.load.workload import TimedRequest
from quantgate.server import Server

Complete = Callable[[dict[str, Any]], Awaitable[web.Response]]


def completion(tokens: int, **more: Any) -> web.Response:
    return web.json_response({"usage": {"completion_tokens": tokens}} | more)


async def answer_all(body: dict[str, Any]) -> web.Response:
    return completion(body["max_tokens"], timings={"queue_ms": 0.5, "ttft_ms": 1.0})


class FakeServer(Server):
    """Answers completions as it is told, and /metrics with the numbers below."""

    def __init__(self, log: Path, complete: Complete = answer_all) -> None:
        super().__init__(subprocess.Popen(["sleep", "600"]), "", log)
        self.complete = complete
        self.peak, self.ooms, self.num_requests = 1000, 0, 0
        self._loop = asyncio.new_event_loop()
        self._runner = self._loop.run_until_complete(self._start())
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    async def _start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    async def _answer(self, request: web.Request) -> web.Response:
        self.num_requests += 1
        return await self.complete(await request.json())

    async def _metrics(self, _: web.Request) -> web.Response:
        text = f"quantgate_peak_memory_bytes {self.peak}\nquantgate_oom_total {self.ooms}\n"
        return web.Response(text=text)

    def die(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self.die()


@pytest.fixture
def fake_server(tmp_path: Path) -> Iterator[Callable[..., FakeServer]]:
    started: list[FakeServer] = []

    def start(*arguments: Any) -> FakeServer:
        log = tmp_path / f"server-{len(started)}.log"
        log.write_text("CUDA out of memory\n", encoding="utf-8")
        started.append(FakeServer(log, *arguments))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def requests_at() -> Callable[..., tuple[TimedRequest, ...]]:
    """Requests of two output tokens each, at these milliseconds."""

    def make(*times_ms: float) -> tuple[TimedRequest, ...]:
        return tuple(
            TimedRequest(at_s=ms / 1e3, prompt_ids=(1, 2, 3), output_tokens=2) for ms in times_ms
        )

    return make
