"""Which servers are running: one at a time where a device is not shared, all resident on a CPU.

Starting a server costs seconds of imports, and an idle one costs a CPU no time, so there each model
is started once and serves both the quality and the load stage.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from quantgate.server import Server, ServerOptions, running_server


class ServerPool:
    """Servers by log file: two arms of one model have two logs, and so two servers."""

    def __init__(self, options: ServerOptions, *, keeps_running: bool) -> None:
        self.options = options
        self._keeps_running = keeps_running
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._starting: dict[Path, threading.Lock] = {}
        self._servers: dict[Path, Server] = {}

    def __enter__(self) -> ServerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @contextmanager
    def serving(self, folder: Path, *, log: Path) -> Iterator[Server]:
        """A ready server of `folder`; may be called from several threads.

        Raises:
            ServerDied: it exited before it was ready.
            MeasurementError: it was not ready in time.
        """
        if not self._keeps_running:
            with running_server(folder, log=log, options=self.options) as server:
                yield server
            return
        with self._lock:
            starting = self._starting.setdefault(log, threading.Lock())
        with starting:
            server = self._servers.get(log) or self._start(folder, log)
            if server.process.poll() is not None:
                # It died under someone else, who has been told.
                server = self._start(folder, log)
        yield server

    def _start(self, folder: Path, log: Path) -> Server:
        context = running_server(folder, log=log, options=self.options)
        server = context.__enter__()
        with self._lock:
            self._servers[log] = server
            self._stack.push(context.__exit__)
        return server
