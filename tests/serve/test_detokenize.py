"""Text that grows, and stops where it should."""

import random
from typing import Any

import pytest

from quantgate_serve.detokenize import TextStream
from quantgate_serve.vocabulary import Vocabulary


def letters(ids: list[int]) -> str:
    """A tokenizer with one character per token."""
    return "".join(chr(token) for token in ids)


def stream_of(text: str, *, stop: list[str]) -> tuple[TextStream, list[str]]:
    stream = TextStream(letters, stop=stop)
    parts = []
    for character in text:
        stream.push(ord(character))
        parts.append(stream.take(final=False))
        if stream.is_stopped:
            break
    stream.finish()
    parts.append(stream.take(final=True))
    return stream, parts


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("hello END more", ["END"], "hello ", True),
        ("hello EN", ["END"], "hello EN", False),
        ("ENENDx", ["END"], "EN", True),
        ("abcab", ["bca", "ab"], "", True),
        ("no stop here", [], "no stop here", False),
    ],
)
def test_a_stop_string_ends_the_text_before_it(
    text: str, stop: list[str], expected: str, stopped: bool
) -> None:
    stream, parts = stream_of(text, stop=stop)
    assert (stream.text, stream.is_stopped) == (expected, stopped)
    assert "".join(parts) == expected


def test_what_may_become_a_stop_string_is_held_back() -> None:
    _, parts = stream_of("aENb", stop=["END"])
    assert parts == ["a", "", "", "ENb", ""]


def test_a_stop_string_is_found_across_multi_character_tokens(tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer)
    ids = vocabulary.encode("the order desk takes 3 nuts today. and more", add_special_tokens=False)
    stream = TextStream(vocabulary.decode, stop=["ts to"])
    for token in ids:
        stream.push(token)
        if stream.is_stopped:
            break
    assert stream.text == "the order desk takes 3 nu"


def test_streamed_parts_add_up_to_the_decoded_whole(tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer)
    source = random.Random(3)
    texts = ["naïve café costs 3 €, today", "日本語 mixed with text", "🙂🙃 emoji"]
    for text in texts + ["".join(source.choices("aé€🙂 \n", k=40)) for _ in range(20)]:
        ids = vocabulary.encode(text, add_special_tokens=False)
        stream = TextStream(vocabulary.decode)
        parts = []
        for token in ids:
            stream.push(token)
            parts.append(stream.take(final=False))
        stream.finish()
        parts.append(stream.take(final=True))
        assert "".join(parts) == vocabulary.decode(ids) == text
        assert all("\ufffd" not in part for part in parts)


def test_broken_bytes_and_end_tokens_without_end_are_decoded_a_few_at_a_time(
    tokenizer: Any,
) -> None:
    vocabulary = Vocabulary(tokenizer)
    source = random.Random(5)
    broken = [token for token in range(len(tokenizer)) if vocabulary.token_text(token) == "\ufffd"]
    endings = [tokenizer.eos_token_id]
    words = vocabulary.encode(" naïve € today", add_special_tokens=False)
    for kinds in [(broken,), (endings,), (broken[:1], endings), (broken, endings, words)]:
        ids = [source.choice(source.choice(kinds)) for _ in range(200)] + words
        longest = 0

        def decode(tokens: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return vocabulary.decode(tokens)

        stream = TextStream(decode)
        parts = []
        for token in ids:
            stream.push(token)
            parts.append(stream.take(final=False))
        stream.finish()
        parts.append(stream.take(final=True))
        assert "".join(parts) == vocabulary.decode(ids)
        assert longest < 80
