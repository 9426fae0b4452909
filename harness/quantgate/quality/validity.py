"""Output validity: checks that need no known answer, such as parsing against a schema."""

from __future__ import annotations

import json
import re

import jsonschema

from quantgate.quality.golden import ValidityCheck


def is_valid(check: ValidityCheck, output: str, *, finish_reason: str) -> bool:
    """Whether one output passes one check."""
    if check.type == "non_empty":
        return bool(output.strip())
    if check.type == "finished":
        # An output cut at its token limit never reached its end token.
        return finish_reason == "stop"
    if check.type == "regex":
        return re.fullmatch(check.pattern or "", output.strip()) is not None
    try:
        value = json.loads(output)
    except (ValueError, RecursionError):
        # A broken model may repeat an opening bracket until its token limit.
        return False
    validator = jsonschema.Draft202012Validator(check.schema_ or {})
    return bool(validator.is_valid(value))
