"""The built-in server as a child process: start it, await readiness, read its memory and counters.

A crash or an OOM of the server is observed here, not suffered: it becomes `ServerDied` with the
last lines of the server's log.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantgate.errors import MeasurementError, ServerDied

_LAST_LOG_LINES = 15
_POLL_S = 0.05
_DRAIN_S = 15.0
_CACHE_MIB = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Command-line options of the server process; None leaves the server's own default."""

    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    max_batch_size: int | None = None
    max_batched_tokens: int | None = None
    kv_tokens: int | None = None
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    max_context: int | None = None
    admission_window_ms: float | None = None
    native_kernels: str | None = None
    caches: bool = False
    """False computes every request whole; True keeps and shares what a server can."""
    ready_timeout_s: float = 180.0

    def arguments(self) -> list[str]:
        options = {
            "--device": self.device,
            "--dtype": self.dtype,
            "--threads": self.threads,
            "--max-batch-size": self.max_batch_size,
            "--max-batched-tokens": self.max_batched_tokens,
            "--kv-tokens": self.kv_tokens,
            "--max-queued-requests": self.max_queued_requests,
            "--max-queued-tokens": self.max_queued_tokens,
            "--max-context": self.max_context,
            "--admission-window-ms": self.admission_window_ms,
            "--native-kernels": self.native_kernels,
        }
        given = [text for k, v in options.items() if v is not None for text in (k, str(v))]
        # Said either way, whatever the server's defaults are: an arm that finds its warm-up in a
        # cache, or its twin under way, is not comparable with one that does not.
        sharing, mib = ("", _CACHE_MIB) if self.caches else ("no-", 0)
        shared = [f"--{sharing}prefix-cache", f"--{sharing}coalescing"]
        kept = ["--response-cache-mib", str(mib), "--embedding-cache-mib", str(mib)]
        return [*given, *shared, *kept]


class Server:
    """One running server process."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def check_alive(self) -> None:
        """Raises ServerDied with the last log lines if the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise ServerDied(f"the server exited ({_exit_text(code)}):\n{last_lines(self.log)}")

    def counters(self) -> dict[str, float]:
        """The server's Prometheus samples, summed over labels, by name.

        Raises:
            ServerDied: the process has ended.
            MeasurementError: /metrics does not answer.
        """
        self.check_alive()
        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
                text = response.read().decode("utf-8")
        except (OSError, http.client.HTTPException) as error:
            self.check_alive()
            raise MeasurementError(f"{self.url}/metrics does not answer: {error}") from error
        return parse_counters(text)

    def peak_bytes(self) -> int:
        """Peak memory: of the device's allocator on CUDA, else of the server process.

        Raises:
            ServerDied: the process has ended.
            MeasurementError: the server does not say.
        """
        peak = self.counters().get("quantgate_peak_memory_bytes")
        if not peak:
            raise MeasurementError(f"{self.url}/metrics has no quantgate_peak_memory_bytes")
        return int(peak)

    def oom_count(self) -> int:
        """Steps that ran out of memory since the server started."""
        return int(self.counters().get("quantgate_oom_total", 0))

    def stop(self) -> None:
        """Asks the server to drain, then ends it; returns when the process is gone."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_DRAIN_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def parse_counters(text: str) -> dict[str, float]:
    """Sums Prometheus samples over their labels; comment lines are skipped."""
    totals: dict[str, float] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        head, _, value = line.rpartition(" ")
        name = head.split("{", 1)[0]
        totals[name] = totals.get(name, 0.0) + float(value)
    return totals


@contextmanager
def running_server(folder: Path, *, log: Path, options: ServerOptions) -> Iterator[Server]:
    """Serves a variant on a free loopback port while the block runs.

    Raises:
        ServerDied: it exited before it was ready.
        MeasurementError: it was not ready in time.
    """
    server = start_server(["--model", str(folder)], log=log, options=options)
    try:
        yield server
    finally:
        server.stop()


def start_server(what: Sequence[str], *, log: Path, options: ServerOptions) -> Server:
    """Starts a server and waits until /ready answers 200; see `running_server`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantgate-") as temporary:
        ready_file = Path(temporary) / "ready.json"
        command = [
            *(sys.executable, "-m", "quantgate_serve", *what),
            *("--host", "127.0.0.1", "--port", "0", "--ready-file", str(ready_file)),
            *options.arguments(),
        ]
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                # Ctrl-C reaches the harness, which drains its servers in order.
                start_new_session=True,
            )
        server = Server(process, "", log)
        try:
            deadline = time.monotonic() + options.ready_timeout_s
            server.url = _await_address(server, ready_file, deadline)
            _await_ready(server, deadline)
        except BaseException:
            server.stop()
            raise
    return server


def last_lines(log: Path) -> str:
    """The end of a log, indented, for an error message."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "  (no log)"
    return "\n".join(f"  {line}" for line in lines[-_LAST_LOG_LINES:]) or "  (empty log)"


def _await_address(server: Server, ready_file: Path, deadline: float) -> str:
    while not ready_file.exists():
        _check_waiting(server, deadline, "listening")
        time.sleep(_POLL_S)
    return str(json.loads(ready_file.read_text(encoding="utf-8"))["url"])


def _await_ready(server: Server, deadline: float) -> None:
    while True:
        _check_waiting(server, deadline, "ready")
        try:
            with urllib.request.urlopen(f"{server.url}/ready", timeout=5) as response:
                if response.status == 200:
                    return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(_POLL_S)


def _check_waiting(server: Server, deadline: float, state: str) -> None:
    server.check_alive()
    if time.monotonic() > deadline:
        raise MeasurementError(
            f"the server was not {state} in time; its last log lines:\n{last_lines(server.log)}"
        )


def _exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
