"""How much a question costs is told from its text and the answers it allows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantgate.quality.golden import load_golden_set
from quantgate.quality.questions import size_of


@pytest.mark.parametrize(
    ("items", "tokens"),
    [
        ([{"input": "x" * 40}], 10 + 8),
        ([{"input": [{"role": "user", "content": "x" * 20}] * 2}], 10 + 8),
        ([{"input": "x" * 40}, {"input": "x" * 80}], 30 + 2 * 8),
    ],
)
def test_a_set_is_as_large_as_its_text_and_the_longest_answers(
    items: list[dict[str, Any]], tokens: float, write_set: Callable[..., Path]
) -> None:
    lines = [{"id": str(i), "target": "a", **item} for i, item in enumerate(items)]
    golden = load_golden_set(write_set(*lines))
    assert size_of((golden,)) == pytest.approx(tokens)
    assert size_of((golden, golden)) == pytest.approx(2 * tokens)
    assert size_of(()) == 0


def test_choices_are_scored_and_generate_nothing(
    write_set: Callable[..., Path], choice_task: dict[str, Any]
) -> None:
    line = {"id": "1", "input": "x" * 40, "choices": ["a", "b"], "target": "a"}
    assert size_of((load_golden_set(write_set(line, task=choice_task)),)) == pytest.approx(10)
