"""What a model is to read: texts or token ids, checked, and texts turned into ids.

Tokenising is done beside the event loop, a piece at a time, so that nobody waits long for it: one
thread does it for everybody. Texts of megabytes come from mistakes and from attackers, and take it
seconds each; they are refused once it is certain that they cannot fit.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from quantgate_serve.http.errors import ApiError, invalid

MAX_PROMPTS = 2048
# Tokenised in one go: at most some 30 ms, then others have their turn.
_PIECE_CHARS = 16_384
# A text cut anywhere has a few tokens more for each cut, and never twice as many.
_CERTAIN = 2

Result = TypeVar("Result")
Encode = Callable[[str], list[int]]


class InThread(Protocol):
    """Does a piece of work in the tokeniser's thread, after those that came before."""

    def __call__(self, work: Callable[[], Result], /) -> Awaitable[Result]: ...


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as they came: all texts or all token ids."""

    texts: list[str] | None
    token_ids: list[list[int]] | None


def parse_prompts(prompt: Any, *, vocab_size: int, param: str = "prompt") -> Prompts:
    """A string, strings, token ids or lists of token ids.

    Raises:
        ApiError: 400, anything else, or an id that is not in the vocabulary.
    """
    if isinstance(prompt, str):
        return Prompts([prompt], None)
    if not isinstance(prompt, list) or not prompt:
        raise invalid(
            param, "expected a string, a list of strings, token ids, or a list of lists of them."
        )
    if all(isinstance(item, str) for item in prompt):
        _check_count(prompt, param)
        return Prompts(prompt, None)
    lists = [prompt] if not isinstance(prompt[0], list) else prompt
    _check_count(lists, param)
    lists = [_token_ids(ids, param) for ids in lists]
    for ids in lists:
        check_token_ids(ids, param=param, vocab_size=vocab_size)
    return Prompts(None, lists)


def _token_ids(values: Any, param: str) -> list[int]:
    if isinstance(values, list):
        # Mostly there is nothing to change, and they are many: no Python code for each of them.
        if set(map(type, values)) == {int}:
            return values
        found = [integral(value) for value in values]
        if all(type(value) is int for value in found):
            return cast(list[int], found)
    raise invalid(param, "a list must hold only strings, only token ids, or only lists of these.")


def check_token_ids(ids: list[int], *, param: str, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary with a 400."""
    if not ids:
        raise invalid(param, "there must be at least one token.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise invalid(param, f"token id {wrong} is not in the vocabulary (0 to {vocab_size - 1}).")


def integral(value: object) -> object:
    """JSON has one kind of number: 5.0 is the integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


async def encode_texts(
    texts: Sequence[str], encode: Encode, *, in_thread: InThread, max_tokens: int
) -> list[list[int]]:
    """The token ids of each text.

    Raises:
        ApiError: 400, a text has more than twice `max_tokens`.
    """
    found: list[list[int]] = []
    for group in _groups(texts):
        if len(group[0]) > _PIECE_CHARS:
            await _check_length(group[0], encode, in_thread=in_thread, max_tokens=max_tokens)
        found += await in_thread(partial(_encode_each, group, encode))
    return found


def _encode_each(texts: Sequence[str], encode: Encode) -> list[list[int]]:
    return [encode(text) for text in texts]


def _groups(texts: Sequence[str]) -> list[list[str]]:
    """`texts` in order, in groups of at most a piece; a longer text is a group of its own."""
    groups: list[list[str]] = []
    size = 0
    for text in texts:
        size += len(text)
        if not groups or size > _PIECE_CHARS:
            groups.append([])
            size = len(text)
        groups[-1].append(text)
    return groups


async def _check_length(text: str, encode: Encode, *, in_thread: InThread, max_tokens: int) -> None:
    num_tokens = 0
    for start in range(0, len(text), _PIECE_CHARS):
        piece = text[start : start + _PIECE_CHARS]
        num_tokens += len(await in_thread(partial(encode, piece)))
        if num_tokens > _CERTAIN * max_tokens:
            raise ApiError(
                400,
                f"a request may have {max_tokens} tokens, and the first {start + len(piece)} of "
                f"{len(text)} characters of a prompt are about {num_tokens}. Shorten the prompt.",
                code="context_length_exceeded",
            )


def _check_count(prompts: list[Any], param: str) -> None:
    if len(prompts) > MAX_PROMPTS:
        raise invalid(param, f"{len(prompts)} prompts, the limit is {MAX_PROMPTS}.")
