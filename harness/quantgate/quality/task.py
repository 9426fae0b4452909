"""task.yaml: how the items of a golden set are asked and scored, in lm-evaluation-harness names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from quantgate.errors import GoldenSetError
from quantgate.quality.validity import ValidityCheck
from quantgate.spec import SpecError, read_document

OutputType = Literal["generate_until", "multiple_choice", "loglikelihood_rolling"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GenerationKwargs(_Strict):
    """How answers are generated; greedy only, since a gate compares item by item."""

    max_gen_toks: int = Field(default=64, ge=1)
    until: tuple[str, ...] = ()
    temperature: float = Field(default=0.0, ge=0.0, le=0.0)


class MetricSpec(_Strict):
    """One scorer, by its lm-evaluation-harness name."""

    metric: Literal[
        "exact_match", "exact_text", "json_fields", "rouge1", "rouge2", "rougeL", "token_f1"
    ]
    higher_is_better: Literal[True] = True


class Task(_Strict):
    """task.yaml, in lm-evaluation-harness names."""

    task: str
    output_type: OutputType
    doc_to_text: Literal["input"] = "input"
    doc_to_target: Literal["target"] = "target"
    doc_to_choice: Literal["choices"] | None = None
    num_fewshot: Literal[0] = 0
    generation_kwargs: GenerationKwargs = GenerationKwargs()
    metric_list: tuple[MetricSpec, ...] = ()
    validity: tuple[ValidityCheck, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_its_output_type(self) -> Task:
        if self.output_type != "loglikelihood_rolling" and not self.metric_list:
            raise ValueError("metric_list is empty: nothing would be scored")
        if self.output_type == "multiple_choice" and self.doc_to_choice is None:
            raise ValueError("multiple_choice needs `doc_to_choice: choices`")
        if self.output_type != "generate_until" and self.validity:
            raise ValueError(
                f"validity checks what was generated, and {self.output_type} generates nothing; "
                "remove it"
            )
        return self


def read_task(path: Path) -> Task:
    """The task of a golden set.

    Raises:
        GoldenSetError: with file and line; a missing file, an unknown key, a scorer or an output
            type that does not fit.
    """
    if not path.exists():
        raise GoldenSetError(
            f"{path}: missing; expected the task in lm-evaluation-harness names "
            "(task, output_type, metric_list, generation_kwargs)."
        )
    try:
        document = read_document(path)
    except SpecError as error:
        raise GoldenSetError(str(error)) from error
    try:
        return Task.model_validate(document.data)
    except ValidationError as error:
        problems = [document.problem(tuple(one["loc"]), _in_words(one)) for one in error.errors()]
        raise GoldenSetError(str(SpecError(path, problems))) from error


def _in_words(error: ErrorDetails) -> str:
    keys = ".".join(part for part in error["loc"] if isinstance(part, str))
    message = error["msg"].removeprefix("Value error, ")
    return f"{keys}: {message}" if keys else message
