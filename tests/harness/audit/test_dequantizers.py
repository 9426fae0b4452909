"""Every dequantizer against the format's definition written out, and against other programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from quantgate.audit import gptq, llm_int8, nf4, rounding
from quantgate.audit.checkpoint import Checkpoint
from quantgate.audit.stored import CannotDequantize
from quantgate.drill.packing import pack_gptq, pack_int8, pack_nf4, pack_words
from quantgate_serve.gptq import GptqLinear, GptqSettings

OUT, IN, GROUP = 16, 64, 16


def store(folder: Path, parts: dict[str, Tensor]) -> Checkpoint:
    save_file(
        {f"m.{name}": tensor.contiguous() for name, tensor in parts.items()},
        folder / "model.safetensors",
    )
    return Checkpoint(folder)


def form(
    bits: int = 4, *, group_size: int = GROUP, version: int = 1, **changes: bool
) -> gptq.GptqFormat:
    fields = {"is_symmetric": True, "has_activation_order": False} | changes
    return gptq.GptqFormat(bits=bits, group_size=group_size, zero_offset=2 - version, **fields)


def by_definition(
    codes: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor, offset: int
) -> Tensor:
    """W[o, i] = (code - zero) * scale, one weight at a time."""
    weight = torch.empty(OUT, IN)
    for o in range(OUT):
        for i in range(IN):
            g = int(group_of[i])
            weight[o, i] = (codes[i, o] - (zeros[g, o] + offset)) * scales[g, o]
    return weight


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([4, 8]),
    version=st.sampled_from([1, 2]),
    is_shuffled=st.booleans(),
)
def test_gptq_is_its_definition_for_any_codes_zeros_scales_and_order(
    tmp_path_factory: pytest.TempPathFactory, seed: int, bits: int, version: int, is_shuffled: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (IN, OUT), generator=random)
    zeros = torch.randint(0, 2**bits, (IN // GROUP, OUT), generator=random)
    scales = torch.rand(IN // GROUP, OUT, generator=random).half()
    group_of = torch.arange(IN) // GROUP
    if is_shuffled:
        group_of = group_of[torch.randperm(IN, generator=random)]
    parts = {
        "qweight": pack_words(codes, bits),
        "qzeros": pack_words(zeros.t().contiguous(), bits).t(),
        "scales": scales,
        "g_idx": group_of.int(),
    }
    checkpoint = store(tmp_path_factory.mktemp("m"), parts)
    stored = gptq.read_weight(
        checkpoint, "m", form(bits, version=version, has_activation_order=is_shuffled), (OUT, IN)
    )
    expected = by_definition(codes, zeros, scales.float(), group_of, 2 - version)
    order = stored.grouping.order
    expected = expected if order is None else expected[:, order]
    assert torch.allclose(stored.dequantize(0, OUT), expected, rtol=1e-6, atol=0)
    assert torch.allclose(stored.dequantize(3, 5), expected[3:5], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_agrees_with_the_servers_loader_which_shares_no_code(
    tmp_path: Path, bits: int
) -> None:
    parts = pack_gptq(torch.randn(OUT, IN), bits=bits, group_size=GROUP)
    stored = gptq.read_weight(store(tmp_path, parts), "m", form(bits), (OUT, IN))
    served = GptqLinear(parts, None, GptqSettings(bits=bits, group_size=GROUP, zero_offset=1))
    assert torch.equal(stored.dequantize(0, OUT), served.dequantize(torch.float32).t())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"qzeros": lambda t: t + 0x11111111}, "a zero point is 9 in format version 1"),
        ({"g_idx": lambda t: t.flip(0)}, "g_idx is not in order, and desc_act is false"),
        ({"g_idx": lambda t: t * 0}, "g_idx has groups of 0 to 64 inputs"),
    ],
)
def test_gptq_says_what_contradicts_the_config(
    tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    parts = pack_gptq(torch.randn(OUT, IN), bits=4, group_size=GROUP)
    parts = {k: change[k](t) if k in change else t for k, t in parts.items()}  # type: ignore[operator]
    stored = gptq.read_weight(store(tmp_path, parts), "m", form(), (OUT, IN))
    assert any(problem in found for found in stored.problems), stored.problems


def test_gptq_packed_for_another_group_size_than_declared_is_said(tmp_path: Path) -> None:
    parts = pack_gptq(torch.randn(OUT, IN), bits=4, group_size=GROUP)
    stored = gptq.read_weight(store(tmp_path, parts), "m", form(group_size=32), (OUT, IN))
    assert "4 groups; group_size 32 over 64 inputs is 2" in stored.problems


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], "qweight is"),
        ("scales", lambda t: t[:, :-1], "scales are"),
        ("qzeros", lambda t: t[:-1], "qzeros are"),
        ("g_idx", lambda t: t[:-1], "g_idx is"),
        ("g_idx", lambda t: t + 1, "g_idx runs from 1 to 4"),
        ("g_idx", None, "lacks g_idx"),
    ],
)
def test_gptq_tensors_that_do_not_fit_together_are_refused(
    tmp_path: Path, part: str, change: object, message: str
) -> None:
    parts = pack_gptq(torch.randn(OUT, IN), bits=4, group_size=GROUP)
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])  # type: ignore[operator]
    with pytest.raises(CannotDequantize, match=message):
        gptq.read_weight(store(tmp_path, parts), "m", form(), (OUT, IN))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"bits": 3}, "bits is 3"), ({"bits": 4, "format": "marlin"}, "format is 'marlin'")],
)
def test_gptq_formats_that_are_not_known_are_refused(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(CannotDequantize, match=message):
        gptq.read_format(values)


@pytest.mark.parametrize("is_nested", [False, True], ids=["plain scales", "double quantization"])
@pytest.mark.parametrize("shape", [(16, 64), (300, 128)], ids=str)
def test_nf4_agrees_with_bitsandbytes(
    tmp_path: Path, shape: tuple[int, int], is_nested: bool
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape) * 0.02
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=is_nested, quant_type="nf4"
    )
    parts = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    stored = nf4.read_weight(store(tmp_path, parts), "m", shape)
    expected = functional.dequantize_4bit(packed, state)
    assert torch.allclose(stored.dequantize(0, shape[0]), expected, rtol=1e-6, atol=1e-9)
    assert torch.allclose(stored.dequantize(2, 5), expected[2:5], rtol=1e-6, atol=1e-9)
    assert stored.problems == []


@pytest.mark.parametrize("is_nested", [False, True])
def test_nf4_blocks_run_over_the_ends_of_rows(tmp_path: Path, is_nested: bool) -> None:
    # bitsandbytes 0.50.2 itself misreads this on a CPU (relative error 0.36); preflight refuses it.
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(8, 96)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=is_nested, quant_type="nf4"
    )
    parts = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    stored = nf4.read_weight(store(tmp_path, parts), "m", (8, 96))
    restored = torch.cat([stored.dequantize(0, 3), stored.dequantize(3, 8)])
    assert float((restored - weight).norm() / weight.norm()) < 0.12


@pytest.mark.parametrize("is_nested", [False, True])
def test_nf4_packed_by_the_drill_is_what_bitsandbytes_packs(is_nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 128)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=is_nested, quant_type="nf4"
    )
    ours = pack_nf4(weight, is_double_quantized=is_nested)
    theirs = state.as_dict(packed=True)
    assert torch.equal(ours["weight"], packed)
    assert torch.allclose(
        ours["weight.absmax"].float(), theirs["absmax"].float(), rtol=1e-6, atol=1
    )


def test_nf4_tensors_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    parts = pack_nf4(torch.randn(8, 64))
    checkpoint = store(tmp_path, parts)
    with pytest.raises(CannotDequantize, match="256 bytes of codes for 1024 weights"):
        nf4.read_weight(checkpoint, "m", (16, 64))
    (tmp_path / "other").mkdir()
    del parts["weight.absmax"]
    with pytest.raises(CannotDequantize, match=r"lacks weight\.absmax"):
        nf4.read_weight(store(tmp_path / "other", parts), "m", (8, 64))


def test_llm_int8_agrees_with_bitsandbytes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(16, 64)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    ours = pack_int8(weight.half().float())
    assert torch.equal(ours["weight"], codes)
    assert torch.allclose(ours["SCB"], scales)
    stored = llm_int8.read_weight(store(tmp_path, ours), "m", (16, 64))
    expected = functional.int8_vectorwise_dequant(codes, scales)
    assert torch.allclose(stored.dequantize(0, 16), expected, rtol=1e-4)
    assert torch.allclose(stored.dequantize(4, 6), expected[4:6], rtol=1e-4)


def test_llm_int8_without_its_scales_is_refused(tmp_path: Path) -> None:
    parts = pack_int8(torch.randn(8, 16))
    del parts["SCB"]
    with pytest.raises(CannotDequantize, match="lacks SCB"):
        llm_int8.read_weight(store(tmp_path, parts), "m", (8, 16))


def test_the_tables_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(
        torch.tensor(rounding.NF4_CODES), functional.get_4bit_type("nf4", device="cpu")
    )
    theirs = functional.create_dynamic_map().sort().values
    assert torch.allclose(rounding.dynamic_map(), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_healthy_uniform_quantizer_makes_the_error_of_one_written_out(bits: int) -> None:
    groups = torch.randn(64, 32)
    parts = pack_gptq(groups, bits=bits, group_size=32)
    # FP16 scales of the artifact are within 0.1 % of the healthy quantizer's.
    codes = gptq.unpack(parts["qweight"].t().contiguous(), bits) - 2 ** (bits - 1)
    weight = codes * parts["scales"].float().t()
    expected = (weight - groups).square().sum(dim=1)
    found = rounding.uniform_rounding_errors(groups, steps=2**bits - 1)
    assert torch.allclose(found.sum(), expected.sum(), rtol=0.02)


@pytest.mark.parametrize("is_nested", [False, True])
def test_the_healthy_nf4_quantizer_makes_the_error_of_one_written_out(is_nested: bool) -> None:
    weight = torch.randn(512, 64)
    codes = torch.tensor(rounding.NF4_CODES)
    absmax = weight.abs().amax(dim=1, keepdim=True)
    nearest = codes[(weight / absmax).unsqueeze(2).sub(codes).abs().argmin(dim=2)] * absmax
    expected = float((nearest - weight).square().sum())
    found = float(rounding.nf4_rounding_errors(weight, is_double_quantized=is_nested).sum())
    # Scales in 8 bits add a little.
    assert found == pytest.approx(expected, rel=0.02 if is_nested else 0.001)


def test_a_group_of_zeros_has_no_rounding_error() -> None:
    zeros = torch.zeros(3, 64)
    assert rounding.uniform_rounding_errors(zeros, steps=15).tolist() == [0, 0, 0]
    assert rounding.nf4_rounding_errors(zeros, is_double_quantized=False).tolist() == [0, 0, 0]
