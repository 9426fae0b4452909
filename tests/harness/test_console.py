"""Progress where output is not a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from quantgate.console import ConsoleProgress


def lines_of(stream: io.StringIO) -> list[str]:
    return [re.sub(r"^\[ *[\d.]+ s\] ", "", line) for line in stream.getvalue().splitlines()]


def test_without_a_terminal_stages_are_plain_lines_and_the_last_step_is_always_told() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(Console(file=stream, width=80))
    progress.stage("load", 3)
    for arm in ("champion", "[bold]a[/bold]", "b"):
        progress.step(note=arm)
    progress.note("int8: [red] is not markup")
    progress.stage("judge")
    progress.step(note="done")
    progress.close()
    lines = lines_of(stream)
    assert "\x1b" not in stream.getvalue()
    # The second step follows the first within five seconds.
    assert lines == [
        "load …",
        "load 1/3  champion",
        "load 3/3  b",
        "  int8: [red] is not markup",
        "judge …",
        "judge 1/?  done",
    ]


def test_on_a_terminal_there_is_a_bar() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(Console(file=stream, force_terminal=True, width=80))
    progress.stage("load", 2)
    progress.step(2, note="b")
    progress.close()
    assert "2/2" in stream.getvalue()
