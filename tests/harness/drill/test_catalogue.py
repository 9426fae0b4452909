"""Every fault of stored weights changes what the audit says, and no harmless change does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from quantgate.audit.report import reduce_audit
from quantgate.audit.weights import audit_artifact
from quantgate.drill.artifact import MutableArtifact
from quantgate.drill.catalogue import catalogue
from quantgate.drill.fault import EVERY, ArtifactFault
from quantgate.drill.layers import LAYERS
from quantgate.measure import Missing, Scalar
from quantgate.variants.source import SourceModel

from ..audit.conftest import Artifact

Mutable = Callable[[SourceModel, str], tuple[Artifact, MutableArtifact]]
PLANTED = [
    pytest.param(fault, scheme, id=f"{fault.name}-{scheme}")
    for fault in catalogue()
    if isinstance(fault, ArtifactFault)
    for scheme in fault.schemes
]
LIMITS = {
    "audit/weight_error.ratio": 1.4,
    "audit/group_error.ratio": 3.0,
    "audit/group_gain.ratio": 1.25,
}


def problems(artifact: Artifact, mutant: MutableArtifact) -> set[str]:
    """The audit metrics beyond the limits of the demo's policy for rounding schemes."""
    variant = mutant.variant()
    report = audit_artifact(artifact.source, artifact.outline, variant.folder, variant.manifest)
    found = set()
    for m in reduce_audit(report, source="audit.json"):
        if isinstance(m, Missing) or (
            isinstance(m, Scalar)
            and (m.value > LIMITS.get(m.metric, 0) if m.metric in LIMITS else _counts(m))
        ):
            found.add(m.metric)
    return found


def _counts(measurement: Scalar) -> bool:
    is_difference = measurement.metric.endswith(("_difference.count", "non_finite.count"))
    return measurement.value > 0 and (is_difference or "constant" in measurement.metric)


@pytest.mark.parametrize(("fault", "scheme"), PLANTED)
def test_the_audit_sees_each_fault_that_it_is_expected_to_and_no_harmless_change(
    untied_source: SourceModel, mutable: Mutable, fault: ArtifactFault, scheme: str
) -> None:
    sound, mutant = mutable(untied_source, scheme)
    before = {path.name: path.read_bytes() for path in sound.folder.iterdir()}
    fault.plant(mutant)
    # Healthy test artifacts are packed by rounding, so that fault alone cannot show here.
    is_seen = fault.expected == "audit" and fault.name != "silent-rounding"
    assert bool(problems(sound, mutant)) == is_seen
    # The sound artifact's files may be linked to: none of its bytes may change.
    assert {path.name: path.read_bytes() for path in sound.folder.iterdir()} == before


def test_names_are_unique_per_scheme_and_say_what_they_do() -> None:
    pairs = [(fault.name, scheme) for fault in catalogue() for scheme in fault.schemes]
    assert len(pairs) == len(set(pairs))
    assert all(fault.what and set(fault.schemes) <= set(EVERY) for fault in catalogue())
    assert all(fault.is_harmful != (fault.expected == "none") for fault in catalogue())
    assert all(fault.advice for fault in catalogue() if fault.expected in LAYERS)


def test_resharding_keeps_every_tensor(untied_source: SourceModel, mutable: Mutable) -> None:
    sound, mutant = mutable(untied_source, "int8-bnb")
    mutant.reshard()
    stored: dict[str, torch.Tensor] = {}
    for path in mutant.folder.glob("*.safetensors"):
        stored |= load_file(path)
    expected = load_file(sound.folder / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
