"""Words for scorers that compare them: in ASCII those of the ROUGE of rouge-score, elsewhere too.

rouge-score keeps the letters a to z and the digits, and so finds no word in Greek and half a word
in German. Here every letter and digit counts, and each character of a script that is written
without spaces is a word of its own.
"""

from __future__ import annotations

import unicodedata

import regex

_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_WORD = regex.compile(rf"{_UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--{_UNSPACED}]+", regex.V1)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, composed (NFC), without punctuation."""
    words: list[str] = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    return words
