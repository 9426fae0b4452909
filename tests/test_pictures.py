"""The pictures of docs/quality.md are what their script draws with the functions that judge."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
COMMITTED = sorted(path.name for path in FOLDER.glob("*.svg"))
Pictures = Mapping[str, Callable[[], str]]


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Pictures:
    """Each picture's name and what draws it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    found: Pictures = importlib.import_module("draw").PICTURES
    return found


@pytest.mark.parametrize("name", COMMITTED)
def test_a_picture_is_what_the_script_draws(name: str, pictures: Pictures) -> None:
    committed = (FOLDER / name).read_text(encoding="utf-8")
    assert committed == pictures[name](), "run: python docs/pictures/draw.py"


@pytest.mark.parametrize("name", COMMITTED)
def test_a_picture_reads_in_dark_and_light_and_says_what_it_shows(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    found = {child.tag.rpartition("}")[2]: child.text for child in root}
    assert found["title"]
    assert found["desc"]
    assert "prefers-color-scheme:dark" in (found["style"] or "")
    assert len(text) < 32_000


def test_every_picture_is_drawn_and_shown_once_with_words_for_those_who_cannot_see_it(
    pictures: Pictures,
) -> None:
    page = (FOLDER.parent / "quality.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[([^]]{20,})\]\(pictures/([^)]+)\)", page)
    assert sorted(name for _, name in shown) == sorted(pictures)
    assert sorted(pictures) == COMMITTED
