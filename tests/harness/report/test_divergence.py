"""Where greedy answers part stands in the report, beside the verdicts."""

from __future__ import annotations

import io

from rich.console import Console

from quantgate.measure import Binomial, Measurement, Missing, Scalar
from quantgate.measurements_file import MeasurementSet, VariantMeasurements
from quantgate.report.divergence import divergence_table
from quantgate.report.table import release_report


def measured(*measurements: Measurement) -> MeasurementSet:
    int8 = VariantMeasurements(
        variant="int8",
        scheme="int8-bnb",
        artifact_sha256="a",
        measurements={m.metric: m for m in measurements},
    )
    return MeasurementSet(
        release_id="r", policy_sha256="p", reference="source", champion="bf16",
        variants={"int8": int8}, noise_floors={},
    )  # fmt: skip


def test_each_set_says_how_many_answers_are_the_same_and_where_the_others_part() -> None:
    found = divergence_table(
        measured(
            Binomial(metric="divergence/a.b.same_answer.rate", source="s", events=3, trials=4),
            Scalar(
                metric="divergence/a.b.shared_tokens.median",
                source="s", value=7, unit="count", n=1,
            ),
            Binomial(metric="divergence/c.same_answer.rate", source="s", events=4, trials=4),
            Missing(metric="divergence/c.shared_tokens.median", reason="no answer differs"),
        )
    )  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(release_report((), run="runs/r", divergence=found))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "int8 a.b 75.0 % 7 tokens" in lines
    assert "int8 c 100.0 % –" in lines


def test_a_release_that_generated_nothing_has_no_such_table() -> None:
    missing = Missing(metric="divergence/a.same_answer.rate", reason="the server died")
    assert divergence_table(measured(missing)) is None
