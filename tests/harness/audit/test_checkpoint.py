"""Reading safetensors piece by piece."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantgate.audit.checkpoint import Checkpoint
from quantgate.errors import ArtifactError

TENSORS = {
    "a": torch.arange(24).view(4, 6),
    "b": torch.randn(5, 3).bfloat16(),
    "c": torch.tensor(7, dtype=torch.uint8),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00001.safetensors")
    rest = {name: tensor for name, tensor in TENSORS.items() if name != "a"}
    save_file(rest, tmp_path / "model-00002.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_reads_as_it_was_saved(folder: Path, name: str) -> None:
    with Checkpoint(folder) as checkpoint:
        read = checkpoint.read(name)
    assert read.dtype == TENSORS[name].dtype
    assert torch.equal(read, TENSORS[name])


def test_rows_and_flat_ranges_are_the_same_bytes(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.read_rows("a", 1, 3), TENSORS["a"][1:3])
        assert torch.equal(checkpoint.read_flat("b", 4, 11), TENSORS["b"].flatten()[4:11])


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    save_file({"a": TENSORS["a"]}, folder / "model-00003.safetensors")
    with pytest.raises(ArtifactError, match=r"a is stored twice, in model-00001.*model-00003"):
        Checkpoint(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated; a ends at byte"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}, "type F4 is not known"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not fill"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "not lists"),
        ({"shape": [2]}, "dtype"),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, entry: dict[str, object], message: str
) -> None:
    header = json.dumps({"t": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ArtifactError, match=message):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors"):
        Checkpoint(tmp_path)
