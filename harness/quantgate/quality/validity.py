"""Output validity: checks that need no known answer, such as parsing against a schema.

Each says valid or not of one output. What counts is in `results.py`: outputs that are invalid where
the reference's is valid. Lengths are compared over a whole set, in `lengths.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, cast

import jsonschema
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from quantgate.quality.repetition import share_repeated
from quantgate.quality.scripts import UnknownScript, check_scripts, share_in_scripts

CheckType: TypeAlias = Literal[
    "json_schema", "regex", "non_empty", "finished", "end_token", "script", "repetition"
]

_NEEDS: Mapping[CheckType, Mapping[str, str]] = {
    "json_schema": {"schema": 'schema: {"type": "object"}'},
    "regex": {"pattern": "pattern: '^[0-9]+$'"},
    "script": {"scripts": "scripts: [Latin]"},
    "repetition": {"ngram": "ngram: 4", "max_share": "max_share: 0.5"},
}
_MAY_HAVE: Mapping[CheckType, tuple[str, ...]] = {"script": ("min_share",)}
_IN_EVERY_LOCK = ("type", "schema", "pattern")


class Output(Protocol):
    """What a check looks at: an answer, or one that was stored."""

    @property
    def output(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended it; None for an end token or the limit."""

    @property
    def token_ids(self) -> Sequence[int]: ...


class ValidityCheck(BaseModel):
    """One check, as `task.yaml` writes it. Shares are 0 to 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: CheckType
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    pattern: str | None = None
    scripts: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Unicode scripts, by the names that regular expressions know: Latin, Cyrillic, Han."""
    min_share: float | None = Field(default=None, gt=0, le=1)
    """Of the letters that must be of these scripts; None for all."""
    ngram: int | None = Field(default=None, ge=1)
    """Tokens that are compared as one."""
    max_share: float | None = Field(default=None, ge=0, lt=1)
    """Of the n-grams that may be repetitions of an earlier one."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> ValidityCheck:
        needs = _NEEDS.get(self.type, {})
        written = {
            field.alias or name
            for name, field in type(self).model_fields.items()
            if name != "type" and getattr(self, name) is not None
        }
        for key, example in needs.items():
            if key not in written:
                raise ValueError(f"type {self.type} needs `{key}`; write: {example}")
        for key in sorted(written - needs.keys() - set(_MAY_HAVE.get(self.type, ()))):
            raise ValueError(f"`{key}` is not for type {self.type}; remove it")
        try:
            re.compile(self.pattern or "")
            jsonschema.Draft202012Validator.check_schema(self.schema_ or {})
            if self.scripts is not None:
                check_scripts(self.scripts)
        except re.error as error:
            raise ValueError(f"`pattern` is not a regular expression: {error}") from error
        except jsonschema.SchemaError as error:
            raise ValueError(f"`schema` is not a JSON schema: {error.message}") from error
        except UnknownScript as error:
            raise ValueError(f"`scripts`: {error}") from error
        return self

    @model_serializer(mode="wrap")
    def _without_what_it_does_not_have(
        self, serialize: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        # Locks hold the digest of this: a new kind of check must leave every older one as it was.
        fields = cast("dict[str, Any]", serialize(self))
        return {k: v for k, v in fields.items() if v is not None or k in _IN_EVERY_LOCK}


def is_valid(check: ValidityCheck, one: Output) -> bool:
    """Whether one output passes one check."""
    return _JUDGES[check.type](check, one)


def _is_json_of_schema(check: ValidityCheck, one: Output) -> bool:
    try:
        value = json.loads(one.output)
    except (ValueError, RecursionError):
        # A broken model may repeat an opening bracket until its token limit.
        return False
    return bool(jsonschema.Draft202012Validator(check.schema_ or {}).is_valid(value))


def _matches(check: ValidityCheck, one: Output) -> bool:
    return re.fullmatch(check.pattern or "", one.output.strip()) is not None


def _is_not_empty(check: ValidityCheck, one: Output) -> bool:
    return bool(one.output.strip())


def _is_finished(check: ValidityCheck, one: Output) -> bool:
    # An output cut at its token limit reached neither its end token nor a stop string.
    return one.finish_reason == "stop"


def _ended_itself(check: ValidityCheck, one: Output) -> bool:
    # A stop string would hide that the model never says its end token.
    return one.finish_reason == "stop" and one.stop_reason is None


def _is_in_scripts(check: ValidityCheck, one: Output) -> bool:
    if not one.output.strip():
        return False
    share = share_in_scripts(one.output, check.scripts or ())
    # Digits and punctuation belong to every script.
    return share is None or share >= (1.0 if check.min_share is None else check.min_share)


def _repeats_little(check: ValidityCheck, one: Output) -> bool:
    share = share_repeated(one.token_ids, check.ngram or 1)
    return share <= (check.max_share or 0.0)


_JUDGES: Mapping[CheckType, Callable[[ValidityCheck, Output], bool]] = {
    "json_schema": _is_json_of_schema,
    "regex": _matches,
    "non_empty": _is_not_empty,
    "finished": _is_finished,
    "end_token": _ended_itself,
    "script": _is_in_scripts,
    "repetition": _repeats_little,
}
