"""How the pipeline says where it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of stages in order; a stage has a number of steps, or None where that is not known."""

    def stage(self, title: str, total: int | None = None) -> None:
        """A new stage begins; the one before it is over."""

    def step(self, count: int = 1, note: str = "") -> None:
        """Some steps of the stage are done."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


class Silent:
    """Says nothing."""

    def stage(self, title: str, total: int | None = None) -> None: ...

    def step(self, count: int = 1, note: str = "") -> None: ...

    def note(self, text: str) -> None: ...
