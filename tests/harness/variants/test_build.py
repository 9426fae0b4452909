"""Building into a store: found again, whole or not at all, with the tool's own words on failure."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import ArtifactError, MeasurementError, UsageError
from quantgate.variants import build
from quantgate.variants.build import Variant, adopt_variant, build_variant
from quantgate.variants.manifest import MANIFEST_NAME
from quantgate.variants.scheme import SCHEMES
from quantgate.variants.source import SourceModel, open_source


@pytest.fixture
def source(model_folder: Path) -> SourceModel:
    return open_source(str(model_folder))


def cast(source: SourceModel, store: Path, **changes: Any) -> Variant:
    values: dict[str, Any] = {
        "name": "bf16",
        "scheme": "bf16",
        "options": {},
        "device": "cpu",
        "calibration": None,
    }
    return build_variant(source, **(values | changes), store=store)


def test_the_same_request_is_found_again_and_another_is_not(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    first = cast(source, store)
    assert not first.is_reused
    assert first.manifest.source_sha256 == source.sha256
    for path in first.folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044
    children: list[str] = []

    def refuse(*_: Any, **__: Any) -> dict[str, Any]:
        children.append("child")
        raise MeasurementError("not again")

    monkeypatch.setattr(build, "_run_child", refuse)
    again = cast(source, store, name="other-name")
    assert again.is_reused
    assert (again.folder, again.manifest) == (first.folder, first.manifest)
    assert children == []
    for changes in ({"options": {"x": 1}}, {"device": "cuda:0"}):
        with pytest.raises(MeasurementError, match="not again"):
            cast(source, store, **changes)


def test_a_stored_artifact_whose_bytes_changed_is_refused(
    source: SourceModel, tmp_path: Path
) -> None:
    variant = cast(source, tmp_path / "store")
    weights = variant.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtifactError, match="digest mismatch"):
        cast(source, tmp_path / "store")


def test_a_failing_child_says_its_last_lines_and_leaves_nothing(
    source: SourceModel, tmp_path: Path
) -> None:
    # The child opens the source again, and finds what happened to it since.
    (source.folder / "tokenizer.json").unlink()
    store = tmp_path / "store"
    with pytest.raises(MeasurementError, match=r"building bf16 failed \(exit code 1\)") as caught:
        cast(source, store)
    assert "no tokenizer in the folder" in str(caught.value)
    assert list(store.iterdir()) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_a_build_cut_short_leaves_nothing_to_be_found(
    source: SourceModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interruption: type[BaseException],
) -> None:
    def half(_: SourceModel, out: Path, **__: Any) -> dict[str, Any]:
        (out / "model.safetensors").write_bytes(b"half")
        raise interruption

    store = tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(build, "_run_child", half)
        with pytest.raises(interruption):
            cast(source, store)
    assert list(store.iterdir()) == []
    assert not cast(source, store).is_reused


def test_a_calibrated_scheme_without_documents_is_told_what_to_write(
    source: SourceModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"calibration: \{path: calibration\.jsonl\}"):
        cast(source, tmp_path, scheme="int4-gptq")


def test_every_scheme_has_a_tool_and_one_that_is_not_installed_is_named(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build._TOOLS.keys() == set(SCHEMES)
    monkeypatch.setitem(build._TOOLS, "bf16", ("no-such-package",))
    with pytest.raises(UsageError, match="bf16 needs no-such-package, which is not installed"):
        cast(source, tmp_path)


def test_a_folder_from_elsewhere_is_adopted_by_the_digest_of_its_files(
    model_folder: Path,
) -> None:
    variant = adopt_variant(model_folder, name="mine", scheme="bf16")
    assert variant.manifest.source_sha256 is None
    assert "model.safetensors" in variant.manifest.files
    assert not (model_folder / MANIFEST_NAME).exists()


def test_a_built_folder_is_adopted_with_its_own_manifest(
    source: SourceModel, tmp_path: Path
) -> None:
    built = cast(source, tmp_path / "store")
    assert adopt_variant(built.folder, name="b", scheme="bf16").manifest == built.manifest
    with pytest.raises(ArtifactError, match=r"variant\.json says bf16, the policy says int4-nf4"):
        adopt_variant(built.folder, name="b", scheme="int4-nf4")
    (built.folder / "extra.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"extra\.txt \(added\)"):
        adopt_variant(built.folder, name="b", scheme="bf16")


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8-bnb"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "int4-nf4",
        ),
        ({"quant_method": "gptq", "bits": 4}, "int4-gptq"),
        ({"quant_method": "gptq", "bits": 8}, "int8-gptq"),
        ({"quant_method": "gptq", "bits": 3}, "gptq, 3 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
    ],
)
def test_a_folder_from_elsewhere_must_hold_the_scheme_that_the_policy_names(
    model_folder: Path, settings: dict[str, Any], scheme: str
) -> None:
    config = model_folder / "config.json"
    value = json.loads(config.read_text(encoding="utf-8")) | {"quantization_config": settings}
    config.write_text(json.dumps(value), encoding="utf-8")
    if scheme in SCHEMES:
        assert adopt_variant(model_folder, name="mine", scheme=scheme).manifest.scheme == scheme
    with pytest.raises(ArtifactError, match=rf"config\.json says {scheme}, the policy says bf16"):
        adopt_variant(model_folder, name="mine", scheme="bf16")


def unlink_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(path.read_bytes()[:-3])


def replace_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]", encoding="utf-8")


def replace_settings(folder: Path) -> None:
    (folder / "config.json").write_text('{"quantization_config": "gptq"}', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unlink_config, "no config.json"),
        (pickle_weights, "pickle weights"),
        (truncate_config, r"config\.json: not JSON"),
        (replace_config, r"config\.json: expected a JSON object"),
        (replace_settings, r"config\.json: expected a JSON object"),
    ],
)
def test_a_folder_that_is_no_model_is_not_adopted(
    model_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(model_folder)
    with pytest.raises(ArtifactError, match=message):
        adopt_variant(model_folder, name="mine", scheme="bf16")


def test_a_folder_that_does_not_exist_is_not_adopted(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        adopt_variant(tmp_path / "nowhere", name="mine", scheme="bf16")


def test_an_artifact_whose_index_leads_out_of_its_folder_is_not_adopted(model_folder: Path) -> None:
    shutil.copy(model_folder / "model.safetensors", model_folder.parent / "other.safetensors")
    index = {"weight_map": {"x": "../other.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ArtifactError, match="lies outside the folder"):
        adopt_variant(model_folder, name="mine", scheme="bf16")
