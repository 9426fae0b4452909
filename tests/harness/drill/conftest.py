"""The audit's tiny source and artifacts serve the drill as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantgate.drill.artifact import MutableArtifact
from quantgate.variants.build import Variant
from quantgate.variants.source import SourceModel

from ..audit.conftest import Artifact, build, source, untied_source

__all__ = ["build", "source", "untied_source"]


@pytest.fixture
def mutable(
    build: Callable[..., Artifact], tmp_path: Path
) -> Callable[[SourceModel, str], tuple[Artifact, MutableArtifact]]:
    """A healthy artifact, and a copy of it to damage."""

    def make(source: SourceModel, scheme: str) -> tuple[Artifact, MutableArtifact]:
        sound = build(source, scheme)
        variant = Variant(name=scheme, folder=sound.folder, manifest=sound.manifest)
        return sound, MutableArtifact(variant, tmp_path / f"{scheme}-mutant", source)

    return make
