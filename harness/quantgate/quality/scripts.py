"""Which Unicode scripts a text is written in: a model that falls into another language shows here.

Only scripts are told apart, not languages that share one: a short answer does not say surely
whether it is German or Dutch, and a check must not guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import regex

# The sign of "micro" is a letter too, but one of every script.
_LETTERS = r"[\p{L}--[\p{Script_Extensions=Common}\p{Script_Extensions=Inherited}]]"
_ANY_LETTER = regex.compile(_LETTERS, regex.V1)


class UnknownScript(ValueError):
    """A name that Unicode does not have."""


def check_scripts(scripts: Sequence[str]) -> None:
    """Raises UnknownScript for the first name that is no script."""
    _letters_of(tuple(scripts))


def share_in_scripts(text: str, scripts: Sequence[str]) -> float | None:
    """The share of a text's letters that may stand in one of the scripts; None without letters.

    By Unicode's Script_Extensions: the long-vowel sign is in Hiragana and in Katakana.

    Raises:
        UnknownScript: Unicode has no script of that name.
    """
    num_letters = len(_ANY_LETTER.findall(text))
    if not num_letters:
        return None
    return len(_letters_of(tuple(scripts)).findall(text)) / num_letters


@cache
def _letters_of(scripts: tuple[str, ...]) -> regex.Pattern[str]:
    inside = "".join(f"[{_property(name)}]" for name in scripts)
    return regex.compile(f"[{_LETTERS}&&[{inside}]]", regex.V1)


def _property(script: str) -> str:
    found = rf"\p{{Script_Extensions={script}}}"
    try:
        # Only a name: what closes the brace would be a pattern of its own.
        if script.replace("_", "").isalpha():
            regex.compile(found)
            return found
    except regex.error:
        pass
    raise UnknownScript(
        f"{script!r} is not a Unicode script; expected names such as Latin, Cyrillic, Greek, "
        "Arabic, Devanagari, Han, Hiragana, Katakana or Hangul"
    )
