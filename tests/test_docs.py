"""What the documents tell people to type exists, and what exists is documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from quantgate.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def written_in(pages: list[Path], pattern: str) -> set[str]:
    return {name for page in pages for name in re.findall(pattern, page.read_text("utf-8"))}


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert written_in(PAGES, r"`?make ([a-z][a-z-]+)\b(?=[` ]*(?:#|$|`))") <= targets


def test_every_command_in_the_documents_exists() -> None:
    assert written_in(PAGES, r"(?:`|^)quantgate ([a-z]+)(?=[ `\n])") <= COMMANDS.keys()


def test_every_command_gives_an_example_in_its_help() -> None:
    without = [
        name
        for name, command in COMMANDS.items()
        if name != "golden" and f"Example: quantgate {name}" not in (command.help or "")
    ]
    assert without == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    # The model card is written by the trainer, and the numbers by the last measured release.
    assert missing == []
