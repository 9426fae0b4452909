"""What performance is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from quantgate.champion import find_champion
from quantgate.errors import ArtifactError, MeasurementError
from quantgate.policy import Policy, load_policy
from quantgate.variants.build import Variant
from quantgate.variants.manifest import VariantManifest, digest_files, write_manifest
from quantgate.variants.source import SourceModel
from quantgate_serve.config import ConfigError

POLICY = Path(__file__).resolve().parents[1] / "gates" / "policies" / "passes.yaml"
SOURCE = SourceModel(name="m", folder=Path("m"), config={}, files={"w": "1"})


@pytest.fixture
def policy() -> Policy:
    return load_policy(POLICY)


@pytest.fixture
def variants(tmp_path: Path) -> dict[str, Variant]:
    return {"bf16": artifact(tmp_path / "bf16", b"bf16")}


def artifact(folder: Path, content: bytes, *, source_sha256: str | None = SOURCE.sha256) -> Variant:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    manifest = VariantManifest(
        scheme="int8-bnb", files=digest_files(folder), source_sha256=source_sha256
    )
    write_manifest(folder, manifest)
    return Variant(name=folder.name, folder=folder, manifest=manifest)


def serves(tmp_path: Path, variant: Variant | None) -> Path:
    """serving.yaml as promotion writes it; None for a rollback to nothing."""
    champion: dict[str, Any] | None = None
    if variant is not None:
        champion = {
            "name": variant.name,
            "path": variant.folder.name,
            "scheme": variant.manifest.scheme,
            "artifact_sha256": variant.manifest.artifact_sha256,
            "files": dict(variant.manifest.files),
            "release": "r",
            "verdicts_sha256": "0" * 64,
            "promoted_at": "2026-01-01",
        }
    path = tmp_path / "serve" / "serving.yaml"
    path.parent.mkdir()
    value = {"schema_version": 1, "model_name": "m", "champion": champion}
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return path


def test_where_nothing_serves_the_policys_champion_is_it(
    tmp_path: Path, policy: Policy, variants: dict[str, Variant]
) -> None:
    for path in (tmp_path / "nowhere.yaml", serves(tmp_path, None)):
        found = find_champion(policy, SOURCE, variants, path)
        assert (found.name, found.folder) == ("bf16", variants["bf16"].folder)


def test_the_variant_that_serves_is_it_when_made_from_the_same_source(
    tmp_path: Path, policy: Policy, variants: dict[str, Variant]
) -> None:
    serving = artifact(tmp_path / "int8", b"int8")
    found = find_champion(policy, SOURCE, variants, serves(tmp_path, serving))
    assert (found.name, found.folder) == ("int8", serving.folder)


@pytest.mark.parametrize("source_sha256", ["f" * 64, None])
def test_a_serving_variant_of_another_or_an_unknown_source_is_not_it(
    tmp_path: Path, policy: Policy, variants: dict[str, Variant], source_sha256: str | None
) -> None:
    other = artifact(tmp_path / "int8", b"int8", source_sha256=source_sha256)
    assert find_champion(policy, SOURCE, variants, serves(tmp_path, other)).name == "bf16"


def test_what_somebody_brought_and_serves_is_it_where_the_policy_has_the_same_bytes(
    tmp_path: Path, policy: Policy, variants: dict[str, Variant]
) -> None:
    brought = artifact(tmp_path / "int8", b"int8", source_sha256=None)
    path = serves(tmp_path, brought)
    # As it came, without a manifest of quantgate's.
    (brought.folder / "variant.json").unlink()
    found = find_champion(policy, SOURCE, variants | {"mine": brought}, path)
    assert (found.name, found.folder) == ("int8", brought.folder)
    assert found.artifact_sha256 == brought.manifest.artifact_sha256
    assert find_champion(policy, SOURCE, variants, path).name == "bf16"


def test_a_serving_variant_whose_bytes_changed_is_refused(
    tmp_path: Path, policy: Policy, variants: dict[str, Variant]
) -> None:
    serving = artifact(tmp_path / "int8", b"int8")
    path = serves(tmp_path, serving)
    (serving.folder / "model.safetensors").write_bytes(b"int9")
    with pytest.raises(ArtifactError, match="digest mismatch"):
        find_champion(policy, SOURCE, variants, path)


def test_a_serving_variant_built_anew_with_other_bytes_is_refused(
    tmp_path: Path, policy: Policy, variants: dict[str, Variant]
) -> None:
    serving = artifact(tmp_path / "int8", b"int8")
    path = serves(tmp_path, serving)
    (serving.folder / "model.safetensors").write_bytes(b"int9")
    (serving.folder / "variant.json").unlink()
    files = digest_files(serving.folder)
    write_manifest(
        serving.folder,
        VariantManifest(scheme="int8-bnb", files=files, source_sha256=SOURCE.sha256),
    )
    with pytest.raises(ArtifactError, match="not the bytes that"):
        find_champion(policy, SOURCE, variants, path)


def test_a_serving_variant_whose_folder_is_gone_is_said(
    tmp_path: Path, policy: Policy, variants: dict[str, Variant]
) -> None:
    serving = artifact(tmp_path / "int8", b"int8")
    path = serves(tmp_path, serving)
    serving.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is not a folder"):
        find_champion(policy, SOURCE, variants, path)


def test_a_champion_that_could_not_be_built_leaves_nothing_to_compare_with(
    tmp_path: Path, policy: Policy
) -> None:
    with pytest.raises(MeasurementError, match="the champion bf16 could not be built"):
        find_champion(policy, SOURCE, {}, tmp_path / "nowhere.yaml")
