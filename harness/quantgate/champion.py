"""The champion: the variant that serves now, or the policy's default where nothing serves yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantgate.errors import ArtifactError, MeasurementError
from quantgate.policy import Policy
from quantgate.variants.build import Variant
from quantgate.variants.manifest import read_manifest, verify
from quantgate.variants.source import SourceModel
from quantgate_serve.config import champion_folder, read_serving_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Champion:
    """What performance is compared with."""

    name: str
    folder: Path
    artifact_sha256: str


def find_champion(
    policy: Policy, source: SourceModel, variants: Mapping[str, Variant], serving_config: Path
) -> Champion:
    """The serving variant when it was made from the same source, else the policy's champion.

    What somebody brought does not say its source; it is the serving one's where `variants` has the
    same bytes.

    Raises:
        ArtifactError: the serving variant's bytes changed since it was promoted.
        MeasurementError: nothing of this source serves, and the policy's champion was not built.
    """
    serving = _serving(source, variants, serving_config)
    if serving is not None:
        return serving
    if policy.champion not in variants:
        raise MeasurementError(
            f"the champion {policy.champion} could not be built, so there is nothing to compare "
            "performance with; see the build error above."
        )
    variant = variants[policy.champion]
    return Champion(
        name=policy.champion,
        folder=variant.folder,
        artifact_sha256=variant.manifest.artifact_sha256,
    )


def _serving(source: SourceModel, variants: Mapping[str, Variant], path: Path) -> Champion | None:
    if not path.is_file():
        return None
    config = read_serving_config(path)
    if config.champion is None:
        return None
    folder = champion_folder(config, path)
    for variant in variants.values():
        digest = variant.manifest.artifact_sha256
        if variant.manifest.source_sha256 is None and digest == config.champion.artifact_sha256:
            return Champion(
                name=config.champion.name, folder=variant.folder, artifact_sha256=digest
            )
    if not (folder / "variant.json").is_file():
        return None
    manifest = read_manifest(folder)
    if manifest.source_sha256 != source.sha256:
        return None
    verify(folder, manifest)
    if manifest.artifact_sha256 != config.champion.artifact_sha256:
        raise ArtifactError(f"{folder}: not the bytes that {path} says are serving.")
    return Champion(
        name=config.champion.name, folder=folder, artifact_sha256=manifest.artifact_sha256
    )
