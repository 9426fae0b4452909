"""Building variants: each in a child process, into a store that finds the same request again."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.errors import ArtifactError, MeasurementError, SourceError, UsageError
from quantgate.files import fsync_folder, sha256_of_json, write_json
from quantgate.variants.calibration import CalibrationSet
from quantgate.variants.manifest import (
    VariantManifest,
    digest_files,
    read_manifest,
    verify,
    write_manifest,
)
from quantgate.variants.scheme import CALIBRATED_SCHEMES, SCHEMES, scheme_in_config
from quantgate.variants.source import SourceModel, weight_files

_TOOLS = {
    "bf16": ("torch", "safetensors"),
    "int8-bnb": ("torch", "transformers", "bitsandbytes"),
    "int4-nf4": ("torch", "transformers", "bitsandbytes"),
    "int8-gptq": ("torch", "transformers", "gptqmodel"),
    "int4-gptq": ("torch", "transformers", "gptqmodel"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A built artifact on disk, its bytes verified."""

    name: str
    folder: Path
    manifest: VariantManifest
    is_reused: bool = False


def build_variant(
    source: SourceModel,
    *,
    name: str,
    scheme: str,
    options: Mapping[str, Any],
    device: str,
    calibration: CalibrationSet | None,
    store: Path,
) -> Variant:
    """Builds one variant, or finds the one built from the same request before.

    Raises:
        ArtifactError: the stored artifact's bytes changed since it was built.
        MeasurementError: the build failed; the message ends with the tool's last lines.
        UsageError: the scheme's package is not installed, or it needs calibration documents.
    """
    if scheme in CALIBRATED_SCHEMES and calibration is None:
        raise UsageError(
            f"variant {name}: {scheme} needs calibration documents; "
            "add to the policy: calibration: {path: calibration.jsonl}."
        )
    used = calibration if scheme in CALIBRATED_SCHEMES else None
    tools = _tool_versions(scheme)
    key = sha256_of_json(
        {
            "source": source.sha256,
            "scheme": scheme,
            "options": dict(options),
            "device": device.split(":")[0],
            "calibration": [used.provenance.sha256, used.ids] if used else None,
            "tools": tools,
        }
    )
    folder = store / f"{scheme}-{key[:16]}"
    if folder.exists():
        manifest = read_manifest(folder)
        verify(folder, manifest)
        return Variant(name=name, folder=folder, manifest=manifest, is_reused=True)
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{scheme}-", dir=store) as temporary:
        out = Path(temporary) / "artifact"
        out.mkdir()
        notes = _run_child(
            source,
            out,
            scheme=scheme,
            options=options,
            device=device,
            calibration_ids=used.ids if used else [],
        )
        manifest = VariantManifest(
            scheme=scheme,
            files=digest_files(out),
            source_sha256=source.sha256,
            options=dict(options),
            calibration=used.provenance if used else None,
            tools=tools,
            notes=notes,
        )
        write_manifest(out, manifest)
        for path in (p for p in out.rglob("*") if p.is_file()):
            # safetensors writes files only their owner may read; a server often runs as another.
            path.chmod(0o644)
        try:
            # The folder appears whole: a build cut short leaves only a temporary one.
            out.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process built the same meanwhile; what stands there is what is judged.
            manifest = read_manifest(folder)
            verify(folder, manifest)
    fsync_folder(store)
    return Variant(name=name, folder=folder, manifest=manifest)


def adopt_variant(folder: Path, *, name: str, scheme: str) -> Variant:
    """Takes an artifact that the user brought; its own manifest is checked if it has one.

    Raises:
        ArtifactError: not a model folder, pickle weights, an index that leads elsewhere, bytes that
            differ from its manifest, or another scheme than the policy names.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: no config.json; expected a folder of safetensors.")
    if not any(folder.glob("*.safetensors")):
        raise ArtifactError(f"{folder}: no *.safetensors; pickle weights are refused.")
    try:
        weight_files(folder)
    except SourceError as error:
        raise ArtifactError(str(error)) from error
    if (folder / "variant.json").exists():
        manifest = read_manifest(folder)
        verify(folder, manifest)
        _check_scheme(folder, "variant.json", found=manifest.scheme, expected=scheme)
    else:
        _check_scheme(folder, "config.json", found=scheme_in_config(folder), expected=scheme)
        manifest = VariantManifest(scheme=scheme, files=digest_files(folder), source_sha256=None)
    return Variant(name=name, folder=folder, manifest=manifest, is_reused=True)


def _check_scheme(folder: Path, where: str, *, found: str, expected: str) -> None:
    if found != expected:
        advice = f" Write: scheme: {found}." if found in SCHEMES else ""
        raise ArtifactError(
            f"{folder}: its {where} says {found}, the policy says {expected}.{advice}"
        )


def _tool_versions(scheme: str) -> dict[str, str]:
    versions = {}
    for package in _TOOLS[scheme]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            extra = "gptq" if package == "gptqmodel" else "bitsandbytes"
            raise UsageError(
                f"{scheme} needs {package}, which is not installed. "
                f"Write: pip install 'quantgate[{extra}]'."
            ) from error
    return versions


def _run_child(
    source: SourceModel,
    out: Path,
    *,
    scheme: str,
    options: Mapping[str, Any],
    device: str,
    calibration_ids: list[list[int]],
) -> dict[str, Any]:
    """Runs the scheme's tool apart, so that its memory, globals and crashes stay there."""
    request = out.parent / "request.json"
    result = out.parent / "notes.json"
    log = out.parent / "build.log"
    write_json(
        request,
        {
            "source": str(source.folder.resolve()),
            "out": str(out.resolve()),
            "notes": str(result.resolve()),
            "scheme": scheme,
            "options": dict(options),
            "device": device,
            "calibration_ids": calibration_ids,
        },
    )
    with log.open("wb") as file:
        code = subprocess.run(
            [sys.executable, "-m", "quantgate.variants.build_process", str(request.resolve())],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # GPTQModel writes logs into the working folder.
            cwd=out.parent,
            check=False,
        ).returncode
    if code or not result.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        tail = "\n  ".join(lines[-12:])
        raise MeasurementError(f"building {scheme} failed (exit code {code}):\n  {tail}")
    if shutil.disk_usage(out).free == 0:
        raise MeasurementError(f"building {scheme}: the disk is full at {out.parent.parent}.")
    notes: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return notes
