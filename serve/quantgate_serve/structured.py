"""What an answer's text may look like: a JSON schema becomes a grammar of llguidance.

llguidance is an optional dependency (extra `structured`). The engine's part is constraints.py.
"""

import json
import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

# Between two tokens of JSON: nothing, a space, or a new line and its indentation. With any amount
# of blanks, as JSON allows, some models write nothing else until max_tokens.
_WHITESPACE = r"( |\n[ ]{0,16})?"
_MAX_SCHEMA_CHARS = 100_000
# A number's digits are followed with a state for each remainder, which no limit of llguidance's
# covers: 100,003 take its first step up to 3 s, ten million never end. 10,007 take 0.06 s.
_MAX_DIVISOR = 10_000
_MAX_GRAMMARS = 64


class StructuredMissingError(Exception):
    """llguidance is not installed."""


class GrammarError(Exception):
    """The schema is wrong, unsatisfiable, or uses what the library cannot follow."""


def is_available() -> bool:
    return find_spec("llguidance") is not None


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of the JSON texts that are valid under `schema`.

    Keywords that could not be enforced are refused, never ignored.

    Raises:
        GrammarError: there is no such grammar.
        StructuredMissingError: llguidance is not installed.
    """
    if not is_available():
        raise StructuredMissingError(
            "this server cannot constrain its output: llguidance is not installed. "
            "Install quantgate[structured], or leave response_format out."
        )
    try:
        text = json.dumps(schema)
        divisor = math.lcm(*_divisors(schema))
    except RecursionError as error:
        raise GrammarError("the schema is nested too deeply.") from error
    if len(text) > _MAX_SCHEMA_CHARS:
        raise GrammarError(
            f"the schema has {len(text)} characters, the limit is {_MAX_SCHEMA_CHARS}."
        )
    if divisor > _MAX_DIVISOR:
        raise GrammarError(
            "multipleOf: its values (as integers, without factors of 2 and 5) have a least common "
            f"multiple above {_MAX_DIVISOR}, which takes too long to follow."
        )
    return _checked_grammar(text)


def _divisors(schema: object) -> Iterator[int]:
    """What each multipleOf asks for; a power of ten only shifts the point."""
    inner: Iterable[object] = ()
    if isinstance(schema, dict):
        inner = schema.values()
        value = schema.get("multipleOf")
        is_number = type(value) is int or (isinstance(value, float) and math.isfinite(value))
        if is_number and value:
            digits = int("".join(map(str, Decimal(str(value)).as_tuple().digits)))
            for factor in (2, 5):
                while digits % factor == 0:
                    digits //= factor
            yield digits
    elif isinstance(schema, list):
        inner = schema
    for one in inner:
        yield from _divisors(one)


@lru_cache(maxsize=_MAX_GRAMMARS)
def _checked_grammar(schema: str) -> str:
    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_pattern": _WHITESPACE}
        )
    except ValueError as error:
        raise GrammarError(f"the schema cannot be used: {error}") from error
    problem = LLMatcher.validate_grammar(grammar)
    if problem:
        raise GrammarError(f"the schema cannot be followed: {problem}")
    return grammar
