"""Checks on an output that need no known answer."""

from __future__ import annotations

from typing import Any

import pytest

from quantgate.quality.golden import ValidityCheck
from quantgate.quality.validity import is_valid

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("check", "output", "expected"),
    [
        ({"type": "non_empty"}, "x", True),
        ({"type": "non_empty"}, " \n", False),
        ({"type": "regex", "pattern": "[0-9]+"}, " 12\n", True),
        ({"type": "regex", "pattern": "[0-9]+"}, "12a", False),
        ({"type": "regex", "pattern": "[0-9]+"}, "", False),
        ({"type": "json_schema", "schema": SCHEMA}, '{"n": 1}', True),
        ({"type": "json_schema", "schema": SCHEMA}, '{"n": "1"}', False),
        ({"type": "json_schema", "schema": SCHEMA}, "{}", False),
        ({"type": "json_schema", "schema": SCHEMA}, '{"n": 1', False),
        ({"type": "json_schema", "schema": SCHEMA}, "[" * 100_000, False),
    ],
)
def test_an_output_is_valid_only_when_it_passes(
    check: dict[str, Any], output: str, expected: bool
) -> None:
    assert is_valid(ValidityCheck.model_validate(check), output, finish_reason="stop") is expected


@pytest.mark.parametrize(
    ("finish_reason", "expected"), [("stop", True), ("length", False), ("error", False)]
)
def test_an_output_cut_at_its_limit_is_not_finished(finish_reason: str, expected: bool) -> None:
    check = ValidityCheck(type="finished")
    assert is_valid(check, "x", finish_reason=finish_reason) is expected
