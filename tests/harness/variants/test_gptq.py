"""GPTQ: one real build of a tiny model, and what is refused before and after one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantgate.files import read_json
from quantgate.variants import gptq
from quantgate.variants.build import build_variant
from quantgate.variants.calibration import load_calibration
from quantgate.variants.scheme import BuildRequest
from quantgate.variants.source import SourceModel, open_source


@pytest.fixture
def source(model_folder: Path) -> SourceModel:
    return open_source(str(model_folder))


@pytest.mark.parametrize(
    ("group_size", "changes", "message"),
    [
        (128, {}, "hidden_size 32 is not a multiple of group_size 128"),
        (33, {}, "hidden_size 32 is not a multiple of group_size 33"),
        (32, {"intermediate_size": 48}, "intermediate_size 48 is not a multiple"),
        (32, {"head_dim": 24}, r"num_attention_heads \* head_dim 48 is not a multiple"),
    ],
)
def test_a_width_that_no_group_divides_is_refused_before_quantizing(
    tmp_path: Path,
    save_llama: Callable[..., Path],
    group_size: int,
    changes: dict[str, int],
    message: str,
) -> None:
    source = open_source(str(save_llama(tmp_path / "source", **changes)))
    request = BuildRequest(
        scheme="int4-gptq", options={"group_size": group_size}, calibration_ids=[[1, 2]]
    )
    with pytest.raises(ValueError, match=message):
        gptq.build(source, tmp_path, request)


def test_a_group_as_wide_as_the_narrowest_layer_divides_it(source: SourceModel) -> None:
    gptq._check_widths(source, 32)


def test_calibration_documents_are_needed(source: SourceModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs calibration documents"):
        gptq.build(source, tmp_path, BuildRequest(scheme="int4-gptq"))


def log_of(tmp_path: Path, *losses: str) -> Path:
    path = tmp_path / "quant_log.csv"
    rows = [f"0,module{i},{loss}" for i, loss in enumerate(losses)]
    path.write_text("\n".join(["layer,module,loss", *rows]) + "\n", encoding="utf-8")
    return path


def test_losses_are_read_and_the_log_with_its_clock_times_is_removed(tmp_path: Path) -> None:
    path = log_of(tmp_path, "0.5", "0.25")
    assert gptq._read_losses(path) == {"layers.0.module0": 0.5, "layers.0.module1": 0.25}
    assert not path.exists()


def test_a_silent_fallback_to_rounding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"round-to-nearest for layers\.0\.module1"):
        gptq._read_losses(log_of(tmp_path, "0.5", "fallback(rtn): 0.1"))


def test_a_log_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="quantized nothing"):
        gptq._read_losses(log_of(tmp_path))


@pytest.mark.parametrize(("bits", "zeros"), [(4, 0x77777777), (8, 0x7F7F7F7F)])
def test_zero_points_are_those_of_a_symmetric_autogptq_file(
    tmp_path: Path, bits: int, zeros: int
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "q.qzeros": torch.full((2, 2), zeros, dtype=torch.int32),
        "q.scales": torch.ones(2, dtype=torch.float16),
        "norm": torch.ones(2),
    }
    save_file(tensors, path)
    gptq._store_the_rest_in_bf16(tmp_path, bits)
    with safe_open(path, framework="pt") as stored:
        assert stored.get_tensor("q.scales").dtype == torch.float16
        assert stored.get_tensor("norm").dtype == torch.bfloat16
    # One value off, in one place: version 2 of the format stores the zero itself.
    tensors["q.qzeros"][1, 1] += 1
    save_file(tensors, path)
    with pytest.raises(RuntimeError, match=r"q\.qzeros: zero points are not AutoGPTQ v1 symmetric"):
        gptq._store_the_rest_in_bf16(tmp_path, bits)


@pytest.mark.parametrize(("scheme", "bits"), [("int4-gptq", 4), ("int8-gptq", 8)])
def test_a_build_is_an_autogptq_checkpoint(
    tmp_path: Path, save_llama: Callable[..., Path], scheme: str, bits: int
) -> None:
    pytest.importorskip("gptqmodel", reason="the gptq extra is not installed", exc_type=ImportError)
    folder = save_llama(tmp_path / "source", hidden_size=128, intermediate_size=128)
    source = open_source(str(folder))
    text = tmp_path / "c.jsonl"
    line = '{"text": "the order desk takes %d boxes of nuts and bolts to the harbour today"}\n'
    text.write_text("".join(line % n for n in range(16)), encoding="utf-8")
    variant = build_variant(
        source,
        name=scheme,
        scheme=scheme,
        options={"group_size": 128},
        device="cpu",
        calibration=load_calibration(text, source, max_documents=16, max_tokens=64),
        store=tmp_path / "store",
    )
    stored: dict[str, torch.Tensor] = {}
    for path in variant.folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            stored |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    layer = "model.layers.0.self_attn.q_proj"
    # Eight nibbles or four bytes to an int32; one group of 128 inputs.
    assert stored[f"{layer}.qweight"].shape == (128 * bits // 32, 128)
    assert stored[f"{layer}.qzeros"].shape == (1, 128 * bits // 32)
    assert stored[f"{layer}.scales"].shape == (1, 128)
    assert stored[f"{layer}.g_idx"].tolist() == [0] * 128
    zeros = [tensor for name, tensor in stored.items() if name.endswith(".qzeros")]
    assert len(zeros) == 7
    middle = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]
    assert all((tensor == middle).all() for tensor in zeros)
    config = read_json(variant.folder / "config.json")["quantization_config"]
    assert config["quant_method"] == "gptq"
    assert (config.get("checkpoint_format") or config["format"]) == "gptq"
    assert (config["bits"], config["sym"], config["desc_act"]) == (bits, True, False)
    assert variant.manifest.notes["num_quantized_modules"] == 7
    assert variant.manifest.calibration is not None
    assert str(tmp_path) not in (variant.folder / "config.json").read_text(encoding="utf-8")
