"""One gate as a person writes it: a metric, a test, a limit with its unit, and whom it is for.

Every rule that needs only the gate itself is checked here: a `Gate` that exists can be judged.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from quantgate.spec import Location
from quantgate.units import (
    MARGIN_UNIT,
    MetricName,
    Quantity,
    UnitError,
    did_you_mean,
    parse_metric,
    parse_quantity,
    units_of,
)

TestName: TypeAlias = Literal["non_inferiority", "mean", "rate", "ratio", "percentile", "limit"]
Scheme: TypeAlias = Literal["bf16", "int8-bnb", "int8-gptq", "int4-nf4", "int4-gptq"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
DEFAULT_CONFIDENCE = 0.95

_LIMIT_KEYS: dict[TestName, tuple[str, ...]] = {
    "non_inferiority": ("margin",),
    "mean": ("max", "min"),
    "rate": ("max", "min"),
    "ratio": ("max", "min"),
    "percentile": ("max",),
    "limit": ("max", "min"),
}


class Refused(ValueError):
    """Problems of one model, each with its place relative to it; `policy.py` adds the lines."""

    def __init__(self, *problems: tuple[Location, str]) -> None:
        self.problems = problems
        super().__init__("; ".join(message for _, message in problems))


class SpecModel(BaseModel):
    """What people write: no unknown keys, no silent conversion, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = list(cls.model_fields)
            problems = [
                (
                    (key,),
                    f'unknown key "{key}"; expected one of {", ".join(known)}'
                    f"{did_you_mean(key, known)}",
                )
                for key in data
                if key not in known
            ]
            if problems:
                raise Refused(*problems)
        return data


def read_limit(value: object, info: ValidationInfo) -> object:
    """A quantity of the gate's metric; a bare number is answered with what to write."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return parse_quantity(value) if isinstance(value, str) else value
    unit = "UNIT"
    expected = "a number and a unit"
    metric = info.data.get("metric")
    if info.field_name == "margin":
        unit, expected = MARGIN_UNIT, "percentage points"
    elif isinstance(metric, str):
        units = _limit_units(parse_metric(metric))
        unit, expected = units[0], f"{metric} in {' or '.join(units)}"
    raise UnitError(
        f"{info.field_name} {value:g} has no unit; expected {expected}; "
        f"write: {info.field_name}: {value:g} {unit}"
    )


def _check_metric(value: str) -> str:
    parse_metric(value).dimension  # noqa: B018 — raises when the name does not say its unit
    return value


Limit: TypeAlias = Annotated[Quantity, BeforeValidator(read_limit)]
Names: TypeAlias = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Confidence: TypeAlias = Annotated[float, Field(gt=0.5, lt=1.0)]


class Gate(SpecModel):
    """One rule about one metric, and the test that decides it."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    metric: Annotated[str, BeforeValidator(lambda v: _check_metric(v) if isinstance(v, str) else v)]
    test: TestName
    margin: Limit | None = None
    """The drop, in percentage points, that is still acceptable."""
    max: Limit | None = None
    min: Limit | None = None
    percentile: Annotated[float, Field(gt=0, lt=100)] | None = None
    """0–100; needed by the percentile test, meaningless to any other."""
    sequential: bool = False
    """Of non_inferiority: hold at every number of items at once, so that it may be looked at while
    items are still being asked, and asking may stop when it is decided."""
    confidence: Confidence = DEFAULT_CONFIDENCE
    """Of each tail of the interval; where it is not written, the policy's."""
    variants: Names | None = None
    """Only these variants; None for all."""
    schemes: Annotated[tuple[Scheme, ...], Field(strict=False, min_length=1)] | None = None
    """Only variants of these schemes; None for all."""
    min_n: Annotated[int, Field(ge=1)] | None = None
    """Fewer samples than this make the verdict INVALID; None leaves it to the test's own floor."""

    @property
    def limit(self) -> Quantity:
        """The limit as written, or the margin as the lowest acceptable difference."""
        if self.margin is not None:
            return Quantity(-self.margin.value, self.margin.unit)
        quantity = self.max if self.max is not None else self.min
        if quantity is None:
            raise Refused(((), f"gate {self.id} has no limit"))
        return quantity

    @property
    def direction(self) -> Literal["max", "min"]:
        """Whether the limit is the largest or the smallest acceptable value."""
        return "max" if self.max is not None else "min"

    @model_validator(mode="after")
    def _fits_together(self) -> Gate:
        problems = [*self._test_problems(), *self._limit_problems()]
        if problems:
            raise Refused(*problems)
        return self

    def _test_problems(self) -> list[tuple[Location, str]]:
        name = parse_metric(self.metric)
        if name.section == "divergence":
            message = (
                f"{self.metric} is reported, never gated: sound variants part from the reference "
                "too, wherever two tokens are nearly as likely, and everything after differs; "
                "gate the score or the validity of the set, or quality/kl_nats.mean"
            )
            return [(("metric",), message)]
        suitable = suitable_tests(name)
        if self.test not in suitable:
            return [
                (
                    ("test",),
                    f'test "{self.test}" does not suit {self.metric}; '
                    f"write: test: {' or '.join(suitable)}",
                )
            ]
        if self.sequential and self.test != "non_inferiority":
            return [
                (("sequential",), f'"sequential" is not for test "{self.test}"; remove it'),
            ]
        if self.test != "percentile":
            if self.percentile is not None:
                return [(("percentile",), f'"percentile" is not for test "{self.test}"; remove it')]
            return []
        if self.percentile is None:
            return [
                (
                    (),
                    f'test "percentile" needs its percentile; '
                    f"write: percentile: {name.percentile:g}",
                )
            ]
        if self.percentile != name.percentile:
            return [
                (
                    ("percentile",),
                    f"percentile {self.percentile:g} does not fit {self.metric}; "
                    f"write: percentile: {name.percentile:g}",
                )
            ]
        return []

    def _limit_problems(self) -> list[tuple[Location, str]]:
        allowed = _LIMIT_KEYS[self.test]
        written = {
            key: quantity
            for key in ("margin", "max", "min")
            if (quantity := getattr(self, key)) is not None
        }
        example = f"{allowed[0]}: {_example(self.test, parse_metric(self.metric))}"
        for key in written:
            if key not in allowed:
                return [((key,), f'"{key}" is not for test "{self.test}"; write: {example}')]
        if len(written) != 1:
            found = " and ".join(written) if written else "none"
            return [
                (
                    (),
                    f'test "{self.test}" needs exactly one of {", ".join(allowed)} '
                    f"(found {found}); write: {example}",
                )
            ]
        [(key, quantity)] = written.items()
        message = self._unit_message(key, quantity) or self._range_message(key, quantity)
        return [((key,), message)] if message else []

    def _unit_message(self, key: str, quantity: Quantity) -> str | None:
        name = parse_metric(self.metric)
        units = (MARGIN_UNIT,) if key == "margin" else _limit_units(name)
        if quantity.unit in units:
            return None
        what = "a margin is a difference" if key == "margin" else f"{name} is measured"
        return (
            f'{key} is in "{quantity.unit}", but {what} in {" or ".join(units)}; '
            f"write: {key}: {quantity.value:g} {units[0]}"
        )

    def _range_message(self, key: str, quantity: Quantity) -> str | None:
        value = quantity.value
        if key == "margin":
            if not 0 < value < 100:
                return f"margin {quantity} is outside 0–100 pt; write: margin: 1 pt"
        elif self.test == "rate":
            share = quantity.to("1")
            if (share if key == "max" else 1 - share) <= 0:
                # The interval of a share never shrinks to its end: such a gate could not pass.
                return f"no sample can show a rate of exactly {quantity}; write: {key}: " + (
                    "0.1 %" if key == "max" else "99.9 %"
                )
            if not 0 < share < 1:
                return f"{key} {quantity} is outside 0–100 %; write: {key}: 1 %"
        elif self.test in ("ratio", "percentile") and value <= 0:
            return f"{key} {quantity} cannot be reached; expected more than 0"
        return None


def suitable_tests(metric: MetricName) -> tuple[TestName, ...]:
    """The tests that can judge what this metric is measured as (docs/architecture.md)."""
    if metric.section == "audit":
        # An audit counts and compares every weight: its numbers have no sampling error.
        return ("limit",)
    if metric.section == "validity":
        # A check counts new failures; the ratio of lengths is one of sums over clusters.
        return ("mean",) if metric.statistic == "ratio" else ("rate",)
    if metric.is_golden_set:
        return ("non_inferiority",)
    if metric.statistic == "ratio":
        # perplexity is a mean over documents, exponentiated; the others are pairs of blocks.
        return ("mean",) if metric.section == "quality" else ("ratio",)
    if metric.statistic == "rate":
        # A rate over tokens of documents may be kept per document (Clustered), which is the honest
        # unit; a rate over requests is a count.
        return ("rate", "mean") if metric.section == "quality" else ("rate",)
    if metric.section == "quality" and metric.statistic == "mean":
        return ("mean",)
    if metric.section == "perf" and metric.is_percentile:
        return ("percentile",)
    return ("limit",)


def _limit_units(metric: MetricName) -> tuple[str, ...]:
    preferred = {"fraction": "%"}.get(metric.dimension)
    units = [unit for unit in units_of(metric.dimension) if unit != MARGIN_UNIT]
    return tuple(sorted(units, key=lambda unit: unit != preferred))


def _example(test: TestName, metric: MetricName) -> str:
    return f"1 {MARGIN_UNIT if test == 'non_inferiority' else _limit_units(metric)[0]}"
