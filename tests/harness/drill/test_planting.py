"""What the pipeline refuses before any gate, and that it lets the sound request through."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from quantgate.drill.catalogue import catalogue
from quantgate.drill.fault import AnyFault
from quantgate.drill.planting import Refused, plant
from quantgate.plan import Plan, ReleaseRequest, make_plan
from quantgate.policy import load_policy
from quantgate.preflight import check_variants
from quantgate.variants import bf16
from quantgate.variants.build import Variant
from quantgate.variants.manifest import VariantManifest, digest_files
from quantgate.variants.scheme import BuildRequest

ROOT = Path(__file__).parents[3]
POLICY = """
policy: refused
model: demo
device: cpu
champion: bf16
variants: {bf16: {scheme: bf16}, int4-gptq: {scheme: int4-gptq, group_size: 128}}
calibration: {path: calibration.jsonl, max_documents: 8, max_tokens: 512}
golden_sets: [order-total]
gates:
  - {id: weights, metric: audit/weight_error.ratio, test: limit, max: 1.4 x}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("project")
    path = root / "gates" / "policies" / "refused.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(POLICY, encoding="utf-8")
    shutil.copyfile(
        ROOT / "harness" / "quantgate" / "demo" / "calibration.jsonl", root / "calibration.jsonl"
    )
    shutil.copytree(ROOT / "golden_sets" / "order-total", root / "golden_sets" / "order-total")
    return make_plan(
        ReleaseRequest(
            policy=load_policy(path), runs=root / "runs", serving_config=root / "serving.yaml"
        )
    )


@pytest.fixture(scope="module")
def sound(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """A cast; for the faults of calibration it stands in the place of the GPTQ variant."""
    folder = tmp_path_factory.mktemp("bf16")
    bf16.build(plan.source, folder, BuildRequest(scheme="bf16"))
    manifest = VariantManifest(
        scheme="bf16", files=digest_files(folder), source_sha256=plan.source.sha256
    )
    return Variant(name="bf16", folder=folder, manifest=manifest)


def fault_named(name: str, scheme: str) -> AnyFault:
    return next(f for f in catalogue() if f.name == name and scheme in f.schemes)


@pytest.mark.parametrize(
    ("name", "variant", "layer", "message"),
    [
        ("calibration-missing", "int4-gptq", "build", "needs calibration documents"),
        ("calibration-golden", "int4-gptq", "preflight", "golden items are in the calibration"),
        ("group-size-not-dividing", "int4-gptq", "preflight", "96"),
        ("golden-edited", "bf16", "lock", "differs from its lock in the items"),
        ("stale-cache", "bf16", "digest", "digest mismatch"),
    ],
)
def test_the_pipeline_refuses(
    plan: Plan, sound: Variant, tmp_path: Path, name: str, variant: str, layer: str, message: str
) -> None:
    with pytest.raises(Refused, match=message) as refused:
        plant(fault_named(name, variant), replace(sound, name=variant), plan, folder=tmp_path / "m")
    assert refused.value.layer == layer


def test_the_sound_request_passes_preflight(plan: Plan) -> None:
    for found in check_variants(plan):
        assert (found.problems, found.overlap) == ((), None)


def test_items_in_another_order_keep_their_lock(plan: Plan, sound: Variant, tmp_path: Path) -> None:
    planted = plant(fault_named("items-shuffled", "bf16"), sound, plan, folder=tmp_path / "m")
    [shuffled], [golden] = planted.golden_sets, plan.golden_sets
    assert [item.id for item in shuffled.items] != [item.id for item in golden.items]
    assert shuffled.items_sha256 == golden.items_sha256
    assert planted.variant == sound


def test_resharded_files_have_a_manifest_that_fits(
    plan: Plan, sound: Variant, tmp_path: Path
) -> None:
    planted = plant(fault_named("resharded", "bf16"), sound, plan, folder=tmp_path / "m")
    assert planted.variant.manifest.files == digest_files(planted.variant.folder)
    assert planted.variant.manifest.files != sound.manifest.files
