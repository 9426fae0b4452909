"""A task that cannot be run as it is written is refused, with the line of each mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import GoldenSetError
from quantgate.quality.golden import load_golden_set

WriteSet = Callable[..., Path]
ITEM = {"id": "a", "input": "2+2=", "target": "4"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_list": []}, "nothing would be scored"),
        ({"metric_list": [{"metric": "bleu"}]}, "exact_match"),
        ({"num_fewshot": 3}, "num_fewshot"),
        ({"generation_kwargs": {"temperature": 0.7}}, "temperature"),
        ({"generation_kwargs": {"max_gen_toks": 0}}, "max_gen_toks"),
        ({"output_type": "multiple_choice"}, "doc_to_choice"),
        ({"surprise": 1}, "surprise"),
        ({"validity": [{"type": "regex"}]}, "needs `pattern`"),
        ({"validity": [{"type": "regex", "pattern": "("}]}, "not a regular expression"),
        ({"validity": [{"type": "json_schema"}]}, "needs `schema`"),
        ({"validity": [{"type": "non_empty", "pattern": "x"}]}, "not for type non_empty"),
        (
            {"output_type": "loglikelihood_rolling", "validity": [{"type": "finished"}]},
            "loglikelihood_rolling generates nothing",
        ),
        (
            {"validity": [{"type": "json_schema", "schema": {"type": "objekt"}}]},
            "not a JSON schema",
        ),
    ],
)
def test_a_task_that_cannot_be_run_as_written_is_refused(
    write_set: WriteSet, text_task: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    folder = write_set(ITEM, task=text_task | changes)
    with pytest.raises(GoldenSetError, match=r"task\.yaml") as caught:
        load_golden_set(folder)
    assert message in str(caught.value)


def test_a_mistake_in_the_task_is_named_with_its_line(write_set: WriteSet) -> None:
    folder = write_set(ITEM)
    task = (
        "task: small\n"
        "output_type: generate_until\n"
        "metric_list: [{metric: exact_match}]\n"
        "validity:\n"
        "  - {type: finished}\n"
        "  - {type: script, scripts: [Elvish]}\n"
        "  - {type: repetition, ngram: 3}\n"
    )
    (folder / "task.yaml").write_text(task, encoding="utf-8")
    with pytest.raises(GoldenSetError) as caught:
        load_golden_set(folder)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{folder}/task.yaml:6: validity: `scripts`: 'Elvish' is not")
    assert second == (
        f"{folder}/task.yaml:7: validity: type repetition needs `max_share`; write: max_share: 0.5"
    )
