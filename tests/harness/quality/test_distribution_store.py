"""A stored comparison is found by what it depends on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantgate.plan import Plan, make_plan
from quantgate.policy_sections import VariantSpec
from quantgate.quality import distribution_store
from quantgate.quality.distribution_store import distribution_paths, group_size_of
from quantgate.variants.build import Variant
from quantgate.variants.manifest import VariantManifest

if TYPE_CHECKING:
    from conftest import MiniProject


@pytest.fixture(scope="module")
def plan(mini_project: MiniProject) -> Plan:
    return make_plan(mini_project.request())


def path_of(plan: Plan, name: str = "int4-nf4", *, weights_sha256: str = "a" * 64) -> Path:
    manifest = VariantManifest(
        scheme="int4-nf4", files={"model.safetensors": weights_sha256}, source_sha256=None
    )
    variant = Variant(name=name, folder=Path(name), manifest=manifest)
    [path] = distribution_paths(plan, {name: variant}, {}, store=Path("store")).values()
    return path


def test_another_name_of_the_same_bytes_finds_it(plan: Plan) -> None:
    assert path_of(plan, "int4-nf4") == path_of(plan, "bf16")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("engine_sha256", lambda: "another engine"),
        ("processor_of", lambda device: "another processor"),
        ("teacher_sha256", lambda: "another comparison"),
        ("group_size_of", lambda plan, name, folder: 64),
    ],
)
def test_another_engine_processor_or_comparison_misses_it(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    before = path_of(plan)
    monkeypatch.setattr(distribution_store, name, value)
    assert path_of(plan) != before


def test_other_weights_threads_or_documents_miss_it(plan: Plan) -> None:
    documents = plan.golden_sets[0]
    found = [
        path_of(plan),
        path_of(plan, weights_sha256="b" * 64),
        path_of(replace(plan, server=replace(plan.server, threads=2))),
        path_of(replace(plan, documents=documents)),
        path_of(replace(plan, source=replace(plan.source, files={"model.safetensors": "c" * 64}))),
        path_of(replace(plan, device="cuda:0")),
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("spec", "stored", "expected"),
    [
        ({"group_size": 64}, None, 64),
        ({}, None, 128),
        ({"path": "gptq"}, 32, 32),
        ({"path": "gptq", "group_size": 64}, 32, 64),
        # All of a row.
        ({"path": "gptq"}, -1, 2**30),
        ({"path": "gptq"}, None, 128),
    ],
)
def test_a_twin_has_groups_as_long_as_its_variants(
    plan: Plan, tmp_path: Path, spec: dict[str, Any], stored: int | None, expected: int
) -> None:
    settings = {} if stored is None else {"group_size": stored}
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4} | settings}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    variants = {"int4": VariantSpec.model_validate({"scheme": "int4-gptq"} | spec)}
    changed = replace(plan, policy=plan.policy.model_copy(update={"variants": variants}))
    assert group_size_of(changed, "int4", tmp_path) == expected


def test_without_documents_nothing_is_stored(plan: Plan) -> None:
    assert distribution_paths(replace(plan, documents=None), {}, {}, store=Path("store")) == {}
