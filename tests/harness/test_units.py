"""Units: what converts, what does not, and which dimension a metric name implies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.units import (
    DIMENSIONS,
    Quantity,
    UnitError,
    convert,
    parse_metric,
    parse_quantity,
    slice_of_tag,
    units_of,
)

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("250 ms", 250.0, "ms"),
        ("1 %", 1.0, "%"),
        ("0 count", 0.0, "count"),
        ("2GiB", 2.0, "GiB"),
        ("  1.10 x ", 1.1, "x"),
        ("-2 pt", -2.0, "pt"),
        ("1e-3 nats", 0.001, "nats"),
        ("16_384 B", 16384.0, "B"),
        (".5 s", 0.5, "s"),
    ],
)
def test_a_number_and_a_unit_are_read(text: str, value: float, unit: str) -> None:
    assert parse_quantity(text) == Quantity(value, unit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("250", "has no unit"),
        ("fast", "is not a quantity"),
        ("", "is not a quantity"),
        ("nan ms", "is not a quantity"),
        ("1e999 ms", "too large"),
        ("250 mss", 'unknown unit "mss".*did you mean "ms"'),
        ("5 minutes ago", "is not a quantity"),
    ],
)
def test_anything_else_is_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(UnitError, match=message):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("quantity", "unit", "expected"),
    [
        (Quantity(0.8, "s"), "ms", 800.0),
        (Quantity(7, "%"), "1", 0.07),
        (Quantity(2, "pt"), "1", 0.02),
        (Quantity(2, "GiB"), "B", 2.0 * 2**30),
        (Quantity(1, "min"), "s", 60.0),
        (Quantity(1, "GB"), "MB", 1000.0),
        (Quantity(3, "x"), "x", 3.0),
    ],
)
def test_conversion_inside_a_dimension_is_exact(
    quantity: Quantity, unit: str, expected: float
) -> None:
    assert quantity.to(unit) == expected


def test_conversion_across_dimensions_is_refused() -> None:
    with pytest.raises(UnitError, match=r'"ms" is a unit of time, "GiB" of size'):
        convert(1.0, "ms", to="GiB")


def test_rates_of_tokens_and_of_requests_do_not_convert() -> None:
    with pytest.raises(UnitError, match="do not convert"):
        convert(1.0, "tok/s", to="req/s")


@PROPERTY
@given(st.floats(-1e9, 1e9), st.sampled_from([(d, u) for d, us in DIMENSIONS.items() for u in us]))
def test_conversion_there_and_back_returns_the_value(value: float, place: tuple[str, str]) -> None:
    dimension, unit = place
    first = units_of(dimension)[0]
    assert convert(convert(value, unit, to=first), first, to=unit) == pytest.approx(value)


def test_a_quantity_prints_as_it_is_written_and_knows_its_dimension() -> None:
    assert str(Quantity(1.5, "GiB")) == "1.5 GiB"
    assert Quantity(1.5, "GiB").dimension == "size"


@pytest.mark.parametrize(
    ("metric", "dimension"),
    [
        ("quality/order-extract.exact_match", "fraction"),
        ("quality/v1.2-set.json_fields", "fraction"),
        ("validity/order-total.finished", "fraction"),
        ("quality/kl_nats.mean", "nats"),
        ("quality/top1_agreement.rate", "fraction"),
        ("quality/perplexity.ratio", "ratio"),
        ("quality/non_finite.count", "count"),
        ("perf/output_tok_per_s.ratio", "ratio"),
        ("perf/output_tok_per_s.mean", "token rate"),
        ("perf/served_req_per_s.mean", "request rate"),
        ("perf/e2e_ms.p95.ratio", "ratio"),
        ("perf/e2e_ms.p95", "time"),
        ("memory/peak_bytes.max", "size"),
        ("stability/oom.count", "count"),
        ("stability/error.rate", "fraction"),
    ],
)
def test_a_metric_name_says_what_it_is_measured_in(metric: str, dimension: str) -> None:
    name = parse_metric(metric)
    assert name.dimension == dimension
    assert str(name) == metric


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("kl_nats", "is not a metric name"),
        ("quality/kl_nats", "is not a metric name"),
        ("qualty/kl_nats.mean", 'unknown metric section "qualty".*did you mean "quality"'),
    ],
)
def test_a_name_of_another_form_is_refused(metric: str, message: str) -> None:
    with pytest.raises(UnitError, match=message):
        parse_metric(metric)


def test_a_name_without_a_unit_is_refused() -> None:
    with pytest.raises(UnitError, match="does not say its unit"):
        _ = parse_metric("memory/peak.max").dimension


@pytest.mark.parametrize(
    ("metric", "percentile"),
    [
        ("perf/e2e_ms.p1", 1.0),
        ("perf/e2e_ms.p95", 95.0),
        ("perf/e2e_ms.p999", 99.9),
        ("perf/e2e_ms.mean", None),
    ],
)
def test_percentiles_are_read_from_the_statistic(metric: str, percentile: float | None) -> None:
    assert parse_metric(metric).percentile == percentile


@pytest.mark.parametrize("statistic", ["p0", "p00", "p000", "p100"])
def test_the_ends_are_no_percentiles(statistic: str) -> None:
    with pytest.raises(UnitError, match="the largest is max"):
        parse_metric(f"perf/e2e_ms.{statistic}")


@pytest.mark.parametrize(
    ("tag", "name"), [("long", "tag-long"), ("template:held out", "tag-template-held-out")]
)
def test_a_tag_becomes_a_part_of_a_metric_name(tag: str, name: str) -> None:
    assert slice_of_tag(tag) == name
    metric = parse_metric(f"quality/kl_nats.{name}.mean")
    assert (metric.stem, metric.dimension, metric.is_golden_set) == ("kl_nats", "nats", False)
    assert parse_metric(f"quality/set.{name}.exact_match").is_golden_set
