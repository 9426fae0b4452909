"""What may be a source model, and why anything else may not."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import SourceError
from quantgate.variants.source import count_parameters, demo_folder, open_source


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(value), encoding="utf-8")


def refusal(model: str | Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(str(model))
    return str(caught.value)


def test_a_model_is_known_by_the_digest_of_weights_config_and_tokenizer(
    model_folder: Path,
) -> None:
    source = open_source(str(model_folder))
    assert source.name == "tiny"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= source.files.keys()
    (model_folder / "README.md").write_text("not part of the model", encoding="utf-8")
    assert open_source(str(model_folder)).sha256 == source.sha256
    edit(model_folder / "tokenizer_config.json", model_max_length=64)
    assert open_source(str(model_folder)).sha256 != source.sha256


def test_the_demo_model_is_known_by_its_name() -> None:
    source = open_source("demo")
    assert (source.name, source.folder) == ("demo", demo_folder())


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_a_config_that_is_no_json_object_is_refused(
    model_folder: Path, name: str, content: bytes
) -> None:
    (model_folder / name).write_bytes(content)
    assert f"{name}: " in refusal(model_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "architectures: BertForMaskedLM"),
        ({"architectures": []}, "architectures: none"),
        ({"architectures": None}, "architectures: none"),
        ({"is_encoder_decoder": True}, "not a causal language model"),
        ({"auto_map": {"AutoConfig": "mine.Config"}}, "config.json has auto_map"),
        ({"quantization_config": {"bits": 4}}, "is quantized already"),
    ],
)
def test_a_model_that_cannot_be_judged_is_refused_with_the_reason(
    model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit(model_folder / "config.json", **changes)
    assert message in refusal(model_folder)


def test_a_tokenizer_that_needs_code_from_the_checkpoint_is_refused(model_folder: Path) -> None:
    edit(model_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]})
    assert "tokenizer_config.json has auto_map" in refusal(model_folder)


def test_pickle_weights_are_refused_by_name(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    assert "only pickle weights (pytorch_model.bin)" in refusal(model_folder)


def test_a_folder_without_weights_is_refused(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    assert "no weights" in refusal(model_folder)


def test_a_folder_without_a_tokenizer_is_refused(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(model_folder)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_weights_are_refused_wherever_they_were_cut(
    model_folder: Path, kept: int
) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors: " in refusal(model_folder)
    assert "Copy" in refusal(model_folder)


@pytest.mark.parametrize("header", [b"[]", b"null", b"{", b'{"a": 1}', b'{"a": {"shape": [1]}}'])
def test_a_header_that_is_not_safetensors_is_refused(model_folder: Path, header: bytes) -> None:
    content = struct.pack("<Q", len(header)) + header
    (model_folder / "model.safetensors").write_bytes(content)
    assert "not a safetensors file" in refusal(model_folder)


def test_a_header_length_beyond_the_file_is_not_allocated(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert "truncated" in refusal(model_folder)


def test_a_file_is_no_folder(model_folder: Path) -> None:
    assert "is a file" in refusal(model_folder / "config.json")


@pytest.mark.parametrize("model", ["nowhere", "./org/name", "a/b/c", "/no/such"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(model: str) -> None:
    assert "no such folder" in refusal(model)


@pytest.mark.parametrize("model", ["org/na me", "org/..", "-org/name"])
def test_a_hub_id_that_cannot_be_one_is_refused_without_asking_the_hub(model: str) -> None:
    assert "neither a folder here nor a model the hub could give" in refusal(model)


def test_parameters_are_counted_from_the_headers(model_folder: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert count_parameters(model_folder) == model.num_parameters()


def test_weights_that_a_repository_carries_twice_are_taken_once(model_folder: Path) -> None:
    source = open_source(str(model_folder))
    weights = model_folder / "model.safetensors"
    (model_folder / "consolidated.safetensors").write_bytes(weights.read_bytes())
    again = open_source(str(model_folder))
    assert again.weight_files == [weights]
    assert again.sha256 == source.sha256


def test_an_index_names_the_weights_and_what_it_names_must_be_there(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "a.safetensors")
    index = model_folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "a.safetensors"}}', encoding="utf-8")
    assert open_source(str(model_folder)).weight_files == [model_folder / "a.safetensors"]
    index.write_text('{"weight_map": {"x": "b.safetensors"}}', encoding="utf-8")
    assert "names b.safetensors, which the folder does not hold" in refusal(model_folder)
    index.write_text('{"weight_map": []}', encoding="utf-8")
    assert "no weight_map" in refusal(model_folder)


@pytest.mark.parametrize("is_absolute", [False, True])
def test_an_index_that_leads_out_of_the_folder_is_refused(
    model_folder: Path, is_absolute: bool
) -> None:
    outside = model_folder.parent / "other.safetensors"
    shutil.copy(model_folder / "model.safetensors", outside)
    named = str(outside) if is_absolute else "../other.safetensors"
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": named}}), encoding="utf-8")
    assert f"names {named}, which lies outside the folder" in refusal(model_folder)
