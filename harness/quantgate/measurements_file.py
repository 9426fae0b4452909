"""`measurements.json`: all that judging needs; written whole, read with errors naming the field."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from quantgate.errors import ArtifactError
from quantgate.files import write_json
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
from quantgate.resolution import NoiseFloor, NoiseFloors

SCHEMA_VERSION = 2

JsonObject: TypeAlias = dict[str, Any]

KINDS: dict[str, type[Any]] = {
    "scalar": Scalar,
    "paired_binary": PairedBinary,
    "clustered": Clustered,
    "clustered_ratio": ClusteredRatio,
    "binomial": Binomial,
    "paired_blocks": PairedBlocks,
    "latencies": Latencies,
    "missing": Missing,
}
_KIND_OF = {cls: kind for kind, cls in KINDS.items()}


class MeasurementsFileError(ArtifactError):
    """A measurements file that cannot be judged; the message names the file and the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantMeasurements:
    """What was measured on one variant; `artifact_sha256` says on which bytes."""

    variant: str
    scheme: str
    artifact_sha256: str
    measurements: Mapping[str, Measurement]

    def __post_init__(self) -> None:
        for metric, measurement in self.measurements.items():
            if metric != measurement.metric:
                raise InvalidMeasurement(
                    f'"{metric}" holds a measurement of "{measurement.metric}"'
                )
        object.__setattr__(self, "measurements", types.MappingProxyType(dict(self.measurements)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementSet:
    """One release, reduced.

    `policy_sha256` is the policy that was measured for. `reference` and `champion` are the
    baselines that were really measured against, which another policy may not silently rename.
    `noise_floors` is how far the reference differs from itself, by metric.
    """

    release_id: str
    policy_sha256: str
    reference: str
    champion: str
    variants: Mapping[str, VariantMeasurements]
    noise_floors: NoiseFloors

    def __post_init__(self) -> None:
        for metric, floor in self.noise_floors.items():
            if metric != floor.metric:
                raise InvalidMeasurement(f'"{metric}" holds the noise floor of "{floor.metric}"')
        object.__setattr__(self, "noise_floors", types.MappingProxyType(dict(self.noise_floors)))
        for name, measured in self.variants.items():
            if name != measured.variant:
                raise InvalidMeasurement(f'"{name}" holds the measurements of "{measured.variant}"')
        object.__setattr__(self, "variants", types.MappingProxyType(dict(self.variants)))


def to_json(measurement: Measurement) -> JsonObject:
    """The measurement as a JSON object with its `kind`."""
    fields = dataclasses.asdict(measurement)
    return {"kind": _KIND_OF[type(measurement)], **fields}


def from_json(data: object) -> Measurement:
    """The inverse of `to_json`; InvalidMeasurement names the field that is wrong."""
    fields = dict(_object("measurement", data))
    kind = fields.pop("kind", None)
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise InvalidMeasurement(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    for field in dataclasses.fields(cls):
        if field.name in fields:
            fields[field.name] = _typed(field.name, str(field.type), fields[field.name])
        elif field.default is dataclasses.MISSING:
            raise InvalidMeasurement(f"{kind} without {field.name}")
    unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise InvalidMeasurement(f"{kind} with unknown {', '.join(sorted(unknown))}")
    measurement: Measurement = cls(**fields)
    return measurement


def write_measurements(path: Path, measurements: MeasurementSet) -> None:
    """Replace `path` as a whole; a reader sees the old file or the new one, never a part."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "release_id": measurements.release_id,
        "policy_sha256": measurements.policy_sha256,
        "reference": measurements.reference,
        "champion": measurements.champion,
        "variants": {
            name: {
                "scheme": measured.scheme,
                "artifact_sha256": measured.artifact_sha256,
                "measurements": [to_json(one) for one in measured.measurements.values()],
            }
            for name, measured in measurements.variants.items()
        },
        "noise_floors": [to_json(floor) for floor in measurements.noise_floors.values()],
    }
    write_json(path, content)


def read_measurements(path: Path) -> MeasurementSet:
    """Read what `write_measurements` wrote.

    Raises:
        MeasurementsFileError: no file, not JSON, another schema, a field that is no measurement.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MeasurementsFileError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MeasurementsFileError(f"{path}: not UTF-8 text") from error
    where = "the file"
    try:
        content = _object(where, json.loads(text, object_pairs_hook=_refuse_duplicates))
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InvalidMeasurement(f"schema_version is {version!r}; expected {SCHEMA_VERSION}")
        where = "variants"
        variants = {}
        for name, entry in _object(where, content.get("variants")).items():
            where = f"variants.{name}"
            variants[name] = _read_variant(name, _object(where, entry))
        where = "noise_floors"
        noise_floors = _read_floors(_list(where, content.get(where)))
        where = "the file"
        return MeasurementSet(
            release_id=_text(content, "release_id"),
            policy_sha256=_text(content, "policy_sha256"),
            reference=_text(content, "reference"),
            champion=_text(content, "champion"),
            variants=variants,
            noise_floors=noise_floors,
        )
    except json.JSONDecodeError as error:
        raise MeasurementsFileError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except InvalidMeasurement as error:
        raise MeasurementsFileError(f"{path}: {where}: {error}") from error


def _read_variant(name: str, entry: JsonObject) -> VariantMeasurements:
    items = _list("measurements", entry.get("measurements"))
    measurements: dict[str, Measurement] = {}
    for index, item in enumerate(items):
        try:
            measurement = from_json(item)
        except InvalidMeasurement as error:
            raise InvalidMeasurement(f"measurements[{index}]: {error}") from error
        if measurement.metric in measurements:
            raise InvalidMeasurement(f"measurements[{index}]: {measurement.metric} appears twice")
        measurements[measurement.metric] = measurement
    return VariantMeasurements(
        variant=name,
        scheme=_text(entry, "scheme"),
        artifact_sha256=_text(entry, "artifact_sha256"),
        measurements=measurements,
    )


def _read_floors(items: list[object]) -> dict[str, NoiseFloor]:
    floors: dict[str, NoiseFloor] = {}
    for item in items:
        floor = from_json(item)
        if not isinstance(floor, Scalar | Missing):
            raise InvalidMeasurement(f"{floor.metric}: a noise floor is one number, or missing")
        if floor.metric in floors:
            raise InvalidMeasurement(f"{floor.metric} appears twice")
        floors[floor.metric] = floor
    return floors


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise InvalidMeasurement(f"{name} is not a list")
    return value


def _object(name: str, value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise InvalidMeasurement(f"{name} is not a JSON object")
    return value


def _text(fields: JsonObject, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidMeasurement(f"{name} is {value!r}; expected text")
    return value


def _typed(name: str, annotation: str, value: object) -> object:
    """Check a JSON value against the annotation of the dataclass field it is for."""
    if annotation.startswith("tuple["):
        if not isinstance(value, list):
            raise InvalidMeasurement(f"{name} is not a list")
        inner = annotation.removeprefix("tuple[").split(",")[0]
        return tuple(_typed(f"{name}[{i}]", inner, item) for i, item in enumerate(value))
    allowed: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str | None": (str, types.NoneType),
    }
    # bool is an int to Python, not to a reader of the file.
    expected = allowed.get(annotation, (str,))
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise InvalidMeasurement(f"{name} is {value!r}; expected {annotation}")
    return value


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> JsonObject:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidMeasurement(f"{', '.join(twice)} appears twice in one object")
    return fields
