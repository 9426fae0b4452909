"""variant.json against the bytes it describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantgate.errors import ArtifactError
from quantgate.variants.manifest import (
    MANIFEST_NAME,
    Calibration,
    VariantManifest,
    digest_files,
    read_manifest,
    verify,
    write_manifest,
)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "more").mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"weights")
    (folder / "more" / "b.json").write_bytes(b"{}")
    manifest = VariantManifest(
        scheme="int4-gptq",
        files=digest_files(folder),
        source_sha256="0" * 64,
        calibration=Calibration(path="c.jsonl", sha256="1" * 64, num_documents=2, num_tokens=9),
    )
    write_manifest(folder, manifest)
    return folder


def test_a_manifest_reads_back_as_it_was_written(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    verify(artifact, manifest)
    assert manifest.files.keys() == {"a.safetensors", "more/b.json"}
    assert manifest.calibration is not None
    assert manifest.calibration.num_tokens == 9


def change(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"weightz")


def remove(folder: Path) -> None:
    (folder / "more" / "b.json").unlink()


def add(folder: Path) -> None:
    (folder / "more" / "c.json").write_bytes(b"{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change, r"a\.safetensors \(changed\)"),
        (remove, r"more/b\.json \(missing\)"),
        (add, r"more/c\.json \(added\)"),
    ],
)
def test_a_byte_that_differs_is_a_digest_mismatch_that_names_the_file(
    artifact: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(artifact)
    with pytest.raises(ArtifactError, match=f"digest mismatch: {message}"):
        verify(artifact, read_manifest(artifact))


@pytest.mark.parametrize("key", ["scheme", "source_sha256", "calibration", "options"])
def test_a_manifest_that_tells_another_story_about_the_same_bytes_is_refused(
    artifact: Path, key: str
) -> None:
    path = artifact / MANIFEST_NAME
    value = json.loads(path.read_text(encoding="utf-8"))
    value[key] = {"changed": 1} if key == "options" else None if value[key] else "changed"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ArtifactError):
        read_manifest(artifact)


def test_a_manifest_edited_to_fit_other_bytes_is_refused(artifact: Path) -> None:
    change(artifact)
    path = artifact / MANIFEST_NAME
    value = json.loads(path.read_text(encoding="utf-8"))
    value["files"] = digest_files(artifact)
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ArtifactError, match="It was edited"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected schema_version 1"),
        ('{"schema_version": 2}', "expected schema_version 1"),
        ('{"schema_version": 1}', "scheme"),
        ('{"schema_version": 1, "scheme": "bf16", "files": 3, "source_sha256": null}', "int"),
        (
            '{"schema_version": 1, "scheme": "x", "files": {}, "source_sha256": "", "new": 1}',
            "new",
        ),
        ('{"schema_version": 1, "notes": {"loss": NaN}}', "not JSON compliant"),
    ],
)
def test_what_is_no_manifest_of_this_schema_is_refused(
    artifact: Path, content: str, message: str
) -> None:
    (artifact / MANIFEST_NAME).write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        read_manifest(artifact)


def test_a_folder_without_a_manifest_or_without_files_is_no_variant(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no variant\.json"):
        read_manifest(tmp_path)
    with pytest.raises(ArtifactError, match="no file in it"):
        digest_files(tmp_path)
