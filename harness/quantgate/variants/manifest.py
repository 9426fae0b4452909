"""variant.json: what an artifact is, how it was made, and the sha256 of each of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantgate.errors import ArtifactError
from quantgate.files import (
    read_json,
    sha256_of_file,
    sha256_of_files,
    sha256_of_json,
    write_json,
)

MANIFEST_NAME = "variant.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a calibrated scheme was calibrated on; golden items must not be in it."""

    path: str
    sha256: str
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantManifest:
    """One artifact: its scheme, its bytes and its origin."""

    scheme: str
    files: Mapping[str, str]
    source_sha256: str | None
    """None for an artifact the user brought: nobody here saw what it was made from."""
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    tools: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def artifact_sha256(self) -> str:
        return sha256_of_files(self.files)


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 of each file of an artifact, by its path inside the folder."""
    files: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # The manifest describes the other files and cannot list itself.
        if path.is_file() and name != MANIFEST_NAME:
            files[name] = sha256_of_file(path)
    if not files:
        raise ArtifactError(f"{folder}: no file in it; expected a built variant.")
    return files


def write_manifest(folder: Path, manifest: VariantManifest) -> None:
    value = asdict(manifest)
    digests = {
        "artifact_sha256": manifest.artifact_sha256,
        # Covers what the files do not: scheme, source and calibration decide what a verdict means.
        "manifest_sha256": sha256_of_json(value),
    }
    write_json(folder / MANIFEST_NAME, value | digests)


def read_manifest(folder: Path) -> VariantManifest:
    """Reads variant.json without looking at the other files: `verify` does that.

    Raises:
        ArtifactError: missing, not JSON, of another schema, or edited.
    """
    path = folder / MANIFEST_NAME
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder}: no {MANIFEST_NAME}; expected a built variant.") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error}). Delete the folder to rebuild.") from error
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(f"{path}: expected schema_version {SCHEMA_VERSION}.")
    stated = value.pop("artifact_sha256", None), value.pop("manifest_sha256", None)
    try:
        found_sha256 = sha256_of_json(value)
        manifest = manifest_from_json(value)
        artifact_sha256 = manifest.artifact_sha256
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}. Delete the folder to rebuild.") from error
    if stated != (artifact_sha256, found_sha256):
        raise ArtifactError(
            f"{path}: its digests do not match what it says. It was edited; delete the folder to "
            "rebuild."
        )
    return manifest


def manifest_from_json(value: Mapping[str, Any]) -> VariantManifest:
    """The inverse of `asdict`.

    Raises:
        TypeError: other fields than a manifest's.
    """
    calibration = value.get("calibration")
    fields = {key: field for key, field in value.items() if key != "calibration"}
    return VariantManifest(
        calibration=Calibration(**calibration) if calibration else None, **fields
    )


def verify(folder: Path, manifest: VariantManifest) -> None:
    """Compares every byte of an artifact with its manifest.

    Raises:
        ArtifactError: a file is missing, added or changed.
    """
    found = digest_files(folder)
    changed = sorted(
        name
        for name in found.keys() | manifest.files.keys()
        if found.get(name) != manifest.files.get(name)
    )
    if changed:
        what = ", ".join(f"{name} ({_change(name, found, manifest.files)})" for name in changed[:5])
        raise ArtifactError(
            f"{folder}: digest mismatch: {what}. The artifact is refused; restore it, or delete "
            "the folder to rebuild."
        )


def _change(name: str, found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    if name not in found:
        return "missing"
    if name not in expected:
        return "added"
    return "changed"
