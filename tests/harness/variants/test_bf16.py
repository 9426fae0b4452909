"""The cast: exact rounding, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantgate.variants import bf16
from quantgate.variants.scheme import BuildRequest
from quantgate.variants.source import open_source


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (1.0 + 2**-8, 1.0),  # half way: to even, down
        (1.0 + 2**-8 + 2**-20, 1.0 + 2**-7),  # just above half way
        (1.0 + 3 * 2**-8, 1.0 + 2**-6),  # half way: to even, up
        (-1.0 - 2**-8, -1.0),
        (2.0**-130, 2.0**-130),  # subnormal, kept
    ],
)
def test_a_number_is_rounded_to_the_nearest_and_ties_to_even(value: float, rounded: float) -> None:
    assert bf16.to_bf16(torch.tensor([value], dtype=torch.float32)).item() == rounded


def test_what_is_not_floating_point_stays_as_it_is() -> None:
    tensor = torch.tensor([1, 2**20 + 1])
    assert bf16.to_bf16(tensor) is tensor


def test_shards_their_index_and_the_tokenizer_are_kept(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    source = open_source(str(save_llama(tmp_path / "source", shard_size="40KB")))
    assert len(source.weight_files) > 1
    out = tmp_path / "out"
    out.mkdir()
    notes = bf16.build(source, out, BuildRequest(scheme="bf16"))
    num_tensors = 0
    for path in source.weight_files:
        before, after = load_file(path), load_file(out / path.name)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor.to(torch.bfloat16))
        num_tensors += len(before)
    assert notes.notes["num_tensors_cast"] == num_tensors
    for name in ("model.safetensors.index.json", *(p.name for p in source.sidecars)):
        assert (out / name).read_bytes() == (source.folder / name).read_bytes()
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
