"""GPTQ checkpoints, packed here by hand, give exactly the weights that their codes say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantgate_serve import offline
from quantgate_serve.coded import CodedLinear
from quantgate_serve.engine import Engine
from quantgate_serve.gptq import GptqFormatError, GptqLinear, GptqSettings, read_settings
from quantgate_serve.kernels import read_kernels
from quantgate_serve.loading import LoadedModel
from quantgate_serve.native.decoder import NativeDecoder
from quantgate_serve.native.layer import find_kernels
from quantgate_serve.native.linear import FEWEST_LANES
from quantgate_serve.request import Request

GROUP = 32


def pack(codes: Tensor, bits: int, *, dim: int) -> Tensor:
    """Codes into int32 words along `dim`, lowest bits first."""
    moved = codes.movedim(dim, -1).to(torch.int64)
    words = moved.reshape(*moved.shape[:-1], -1, 32 // bits)
    shifted = words << torch.arange(0, 32, bits)
    total = shifted.sum(-1)
    return (total - ((total >> 31) << 32)).to(torch.int32).movedim(-1, dim).contiguous()


def quantize(weight: Tensor, *, bits: int, groups: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Symmetric round-to-nearest of `weight` [out, in]: the tensors, and the weights they mean."""
    middle = 1 << (bits - 1)
    columns = weight.t().float()  # [in, out]
    num_groups = int(groups.max()) + 1
    scales = torch.stack(
        [columns[groups == g].abs().amax(0) / (middle - 1) for g in range(num_groups)]
    ).half()
    codes = (columns / scales.float()[groups]).round().clamp(-middle, middle - 1) + middle
    tensors = {
        "qweight": pack(codes, bits, dim=0),
        # Format v1 stores the zero point minus one.
        "qzeros": pack(torch.full_like(scales, middle - 1).to(torch.int64), bits, dim=1),
        "scales": scales,
        "g_idx": groups.to(torch.int32),
    }
    return tensors, ((codes - middle) * scales.float()[groups]).t()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_a_linear_computes_with_the_weights_its_codes_mean(bits: int, is_sorted: bool) -> None:
    torch.manual_seed(bits)
    weight, bias = torch.randn(48, 128), torch.randn(48)
    groups = torch.arange(128) // GROUP
    if not is_sorted:  # desc_act: columns of a group lie anywhere
        groups = groups[torch.randperm(128)]
    tensors, meant = quantize(weight, bits=bits, groups=groups)
    linear = GptqLinear(tensors, bias, GptqSettings(bits, GROUP, zero_offset=1))
    x = torch.randn(2, 5, 128)
    expected = torch.nn.functional.linear(x, meant, bias)
    # FP32 sums of 128 products in another order.
    torch.testing.assert_close(linear(x), expected, atol=1e-4, rtol=1e-5)
    assert linear.codes.numel() * 8 == weight.numel() * bits


@pytest.fixture(scope="module", params=[4, 8], ids=["int4", "int8"])
def gptq_folder(
    request: Any,
    save_model: Callable[..., Path],
    config_of: Callable[..., Any],
    tmp_path_factory: Any,
) -> Path:
    """A Llama whose layers' Linears are packed to 4 or 8 bits, as AutoGPTQ writes them."""
    bits: int = request.param
    source = save_model(config_of(transformers.LlamaConfig), dtype=torch.float16)
    folder: Path = tmp_path_factory.mktemp("gptq")
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." in name and tensor.ndim == 2:
            groups = torch.arange(tensor.shape[1]) // GROUP
            packed, _ = quantize(tensor, bits=bits, groups=groups)
            prefix = name.removesuffix("weight")
            tensors |= {prefix + key: value for key, value in packed.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for path in source.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_gptq_folder_serves_the_tokens_of_generate(
    gptq_folder: Path,
    make_engine: Callable[..., Engine],
    make_request: Callable[..., Request],
    prompts: Callable[[int], list[list[int]]],
    run_all: Callable[[Engine, list[Request]], None],
    generate: Callable[..., list[int]],
) -> None:
    requests = [make_request(prompt) for prompt in prompts(64)]
    run_all(make_engine(gptq_folder), requests)
    for request in requests:
        assert request.output_ids == generate(gptq_folder, request.prompt_ids)


def test_a_gptq_folder_loads_as_quantized_linears(gptq_folder: Path) -> None:
    loaded = offline.load_model(gptq_folder, device="cpu")
    kinds = [type(module) for module in loaded.model.modules()]
    assert loaded.quantization == "gptq"
    assert kinds.count(GptqLinear) == 2 * 7
    bits = json.loads((gptq_folder / "config.json").read_text())["quantization_config"]["bits"]
    names = [kernel.name for kernel in read_kernels(loaded.model, loaded.device)]
    assert names == [f"quantgate GptqLinear {bits} bit", "torch Linear float32"]


@pytest.mark.skipif(
    (kernels := find_kernels()) is None or kernels.lanes < FEWEST_LANES,
    reason="no C compiler, or no AVX2",
)
def test_the_layers_of_a_gptq_folder_are_computed_in_one_call(
    gptq_folder: Path, load_model: Callable[[Path], LoadedModel]
) -> None:
    decoder = load_model(gptq_folder).model
    assert isinstance(decoder, NativeDecoder)
    assert sum(isinstance(module, CodedLinear) for module in decoder.modules()) == 2 * 7
    read = [kernel.name for kernel in read_kernels(decoder, torch.device("cpu"))]
    assert read[0].startswith("quantgate fused GPTQ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "format is 'marlin'"),
    ],
)
def test_an_unknown_packing_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(GptqFormatError, match=message):
        read_settings(values)
