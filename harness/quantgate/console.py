"""Progress on a terminal: one bar per stage there, plain lines where output is not a terminal."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# Without a terminal, at most one line in this time per stage.
_LINE_EVERY_S = 5.0


class ConsoleProgress:
    """Implements `quantgate.progress.Progress`; may be told of steps from several threads."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._title = ""
        self._total: int | None = None
        self._done = 0
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:>14}"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:.0f}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=console,
            )
            self._bar.start()

    def stage(self, title: str, total: int | None = None) -> None:
        with self._lock:
            self._title, self._total, self._done, self._last_line = title, total, 0, 0.0
            if self._bar is not None:
                self._finish_task()
                self._task = self._bar.add_task(title, total=total, note="")
            else:
                self._line(f"{title} …")

    def step(self, count: int = 1, note: str = "") -> None:
        with self._lock:
            self._done += count
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, advance=count, note=note)
                return
            now = time.monotonic()
            is_last = self._done == self._total
            if is_last or now - self._last_line >= _LINE_EVERY_S:
                self._last_line = now
                self._line(f"{self._title} {self._done}/{self._total or '?'}  {note}")

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", style="yellow", highlight=False, markup=False)

    def close(self) -> None:
        """Ends the display, so that what is printed next stands below it."""
        if self._bar is not None:
            self._finish_task()
            self._bar.stop()

    def _finish_task(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, note="")
            self._bar.stop_task(self._task)

    def _line(self, text: str) -> None:
        elapsed_s = time.monotonic() - self._started
        self._console.print(f"[{elapsed_s:6.1f} s] {text}", highlight=False, markup=False)
