"""measurements.json: what is written comes back, and everything else is refused by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantgate.measure import (
    Binomial,
    Clustered,
    ClusteredRatio,
    InvalidMeasurement,
    Latencies,
    Measurement,
    Missing,
    PairedBinary,
    PairedBlocks,
    Scalar,
)
from quantgate.measurements_file import (
    MeasurementSet,
    MeasurementsFileError,
    VariantMeasurements,
    from_json,
    read_measurements,
    to_json,
    write_measurements,
)
from quantgate.resolution import NoiseFloor

EVERY_KIND: tuple[Measurement, ...] = (
    Scalar(metric="memory/peak_bytes.max", source="s.json", value=5e8, unit="B", n=40),
    PairedBinary(
        metric="quality/set.exact_match",
        source="set.parquet",
        both=300,
        reference_only=4,
        candidate_only=2,
        neither=94,
    ),
    Clustered(
        metric="quality/perplexity.ratio",
        source="prose.parquet",
        unit="x",
        totals=(0.5, -0.25),
        counts=(10, 20),
        transform="exp",
        paired=True,
    ),
    Binomial(metric="stability/error.rate", source="load", events=0, trials=240),
    PairedBlocks(
        metric="perf/e2e_ms.p95.ratio",
        source="load",
        unit="ms",
        champion=(1.0, 2.0),
        candidate=(1.5, 2.5),
    ),
    Latencies(metric="perf/e2e_ms.p95", source="load", unit="ms", values=(1.5, 2.0), failed=1),
    Missing(metric="stability/oom.count", reason="server died", source="server.log"),
    ClusteredRatio(
        metric="quality/kl_nats.healthy.ratio",
        source="prose.parquet",
        baseline=(0.5, 0.25),
        candidate=(0.75, 0.125),
    ),
)


FLOORS: tuple[NoiseFloor, ...] = (
    Scalar(metric="quality/kl_nats.mean", source="again.parquet", value=1e-7, unit="nats", n=9),
    Missing(metric="quality/set.exact_match", reason="server died"),
)


def release(*measurements: Measurement) -> MeasurementSet:
    measured = VariantMeasurements(
        variant="int8",
        scheme="int8-bnb",
        artifact_sha256="ab" * 32,
        measurements={one.metric: one for one in measurements},
    )
    return MeasurementSet(
        release_id="r1",
        policy_sha256="cd" * 32,
        reference="source",
        champion="bf16",
        variants={"int8": measured},
        noise_floors={floor.metric: floor for floor in FLOORS},
    )


def edited(tmp_path: Path, edit: Any) -> Path:
    path = tmp_path / "measurements.json"
    write_measurements(path, release(*EVERY_KIND))
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("measurement", EVERY_KIND, ids=lambda m: type(m).__name__)
def test_every_kind_survives_json(measurement: Measurement) -> None:
    assert from_json(json.loads(json.dumps(to_json(measurement)))) == measurement


def test_a_release_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    write_measurements(path, release(*EVERY_KIND))
    assert read_measurements(path) == release(*EVERY_KIND)
    assert [entry.name for entry in tmp_path.iterdir()] == ["measurements.json"]


def test_a_missing_without_a_source_is_read() -> None:
    missing = Missing(metric="stability/oom.count", reason="why")
    assert from_json(to_json(missing)) == missing
    assert from_json({"kind": "missing", "metric": missing.metric, "reason": "why"}) == missing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guess"}, "kind is 'guess'; expected one of scalar"),
        ({"kind": None}, "kind is None"),
        ({"trials": None}, "trials is None; expected int"),
        ({"trials": True}, "trials is True; expected int"),
        ({"trials": 2.5}, "trials is 2.5; expected int"),
        ({"metric": 3}, "metric is 3; expected str"),
        ({"extra": 3}, "binomial with unknown extra"),
        ({"events": 900}, "900 events in 240 trials"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidMeasurement, match=message):
        from_json({**to_json(EVERY_KIND[3]), **change})


def test_an_absent_field_is_named() -> None:
    fields = to_json(EVERY_KIND[3])
    del fields["trials"]
    with pytest.raises(InvalidMeasurement, match="binomial without trials"):
        from_json(fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [(5, "values is not a list"), ([1.0, "2"], r"values\[1\] is '2'; expected float")],
)
def test_a_wrong_column_is_named(values: Any, message: str) -> None:
    with pytest.raises(InvalidMeasurement, match=message):
        from_json({**to_json(EVERY_KIND[5]), "values": values})


def test_what_is_not_an_object_is_not_a_measurement() -> None:
    with pytest.raises(InvalidMeasurement, match="not a JSON object"):
        from_json([1])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(schema_version=1), "the file: schema_version is 1; expected 2"),
        (lambda c: c.pop("release_id"), "the file: release_id is None; expected text"),
        (lambda c: c.update(reference=""), "the file: reference is ''; expected text"),
        (lambda c: c.update(variants=[]), "variants: variants is not a JSON object"),
        (lambda c: c["variants"].update(int8=1), "variants.int8 is not a JSON object"),
        (lambda c: c["variants"]["int8"].pop("scheme"), "variants.int8: scheme is None"),
        (
            lambda c: c["variants"]["int8"].update(measurements={}),
            "variants.int8: measurements is not a list",
        ),
        (
            lambda c: c["variants"]["int8"]["measurements"][0].update(value=None),
            r"variants.int8: measurements\[0\]: value is None; expected float",
        ),
        (
            lambda c: c["variants"]["int8"]["measurements"].append(to_json(EVERY_KIND[0])),
            r"measurements\[8\]: memory/peak_bytes.max appears twice",
        ),
        (lambda c: c.pop("noise_floors"), "noise_floors: noise_floors is not a list"),
        (
            lambda c: c["noise_floors"].append(to_json(EVERY_KIND[3])),
            "noise_floors: .*: a noise floor is one number, or missing",
        ),
        (
            lambda c: c["noise_floors"].append(to_json(FLOORS[0])),
            "noise_floors: quality/kl_nats.mean appears twice",
        ),
    ],
)
def test_an_edited_file_is_refused_by_file_and_field(
    tmp_path: Path, edit: Any, message: str
) -> None:
    with pytest.raises(MeasurementsFileError, match=rf"measurements\.json: .*{message}"):
        read_measurements(edited(tmp_path, edit))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"measurements\.json:1: not JSON"),
        ('{"schema_version": 1,\n', r"measurements\.json:2: not JSON"),
        ("[]", "the file is not a JSON object"),
        ('{"a": 1, "a": 2}', "a appears twice in one object"),
    ],
)
def test_what_is_not_whole_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "measurements.json"
    path.write_text(text)
    with pytest.raises(MeasurementsFileError, match=message):
        read_measurements(path)


def test_not_a_number_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    write_measurements(path, release(EVERY_KIND[0]))
    path.write_text(path.read_text().replace("500000000.0", "NaN"))
    with pytest.raises(MeasurementsFileError, match="value is nan; expected a finite number"):
        read_measurements(path)


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(MeasurementsFileError, match=r"none\.json: cannot be read: No such file"):
        read_measurements(tmp_path / "none.json")


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(MeasurementsFileError, match="not UTF-8"):
        read_measurements(path)


def test_a_measurement_stands_under_its_own_metric() -> None:
    with pytest.raises(InvalidMeasurement, match=r'oom\.count" holds a measurement of'):
        VariantMeasurements(
            variant="v",
            scheme="bf16",
            artifact_sha256="0",
            measurements={"stability/oom.count": EVERY_KIND[0]},
        )


def test_measurements_stand_under_their_own_variant() -> None:
    with pytest.raises(InvalidMeasurement, match='"int4" holds the measurements of "int8"'):
        MeasurementSet(
            release_id="r",
            policy_sha256="0",
            reference="source",
            champion="bf16",
            variants={"int4": release().variants["int8"]},
            noise_floors={},
        )


def test_noise_floors_stand_under_their_own_metric() -> None:
    with pytest.raises(InvalidMeasurement, match=r'p99" holds the noise floor of "quality/kl_nats'):
        MeasurementSet(
            release_id="r",
            policy_sha256="0",
            reference="source",
            champion="bf16",
            variants={},
            noise_floors={"quality/kl_nats.p99": FLOORS[0]},
        )
