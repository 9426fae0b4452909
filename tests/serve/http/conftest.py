"""Servers as child processes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest

Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serve(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Serves the tiny model with more options while a block runs; gives its URL once ready."""

    @contextmanager
    def run(*options: str) -> Iterator[str]:
        work = tmp_path_factory.mktemp("served")
        ready_file, log = work / "ready.json", work / "log"
        with log.open("wb") as out:
            child = subprocess.Popen(
                [
                    *(sys.executable, "-m", "quantgate_serve", "--model", str(llama_folder)),
                    *("--port", "0", "--ready-file", str(ready_file), "--device", "cpu"),
                    *("--threads", "1", "--served-model-name", "tiny", *options),
                ],
                stdout=out,
                stderr=out,
            )
        try:
            deadline = time.monotonic() + 240
            while not ready_file.exists():
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "not listening after four minutes"
                time.sleep(0.05)
            url = str(json.loads(ready_file.read_text())["url"])
            while httpx.get(f"{url}/ready").status_code != 200:
                assert time.monotonic() < deadline, "not ready after four minutes"
                time.sleep(0.02)
            yield url
            assert child.poll() is None, log.read_text()
        finally:
            child.terminate()
            child.wait()

    return run


@pytest.fixture(scope="session")
def shared_url(serve: Serve) -> Iterator[str]:
    """A server with everything switched on, for tests that do not mind each other's requests."""
    with serve("--kv-tokens", "4096") as url:
        yield url
