"""Fused kernels compute with exactly the weights of the reference, whatever the shape."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from quantgate_serve import coded
from quantgate_serve.coded import CodedLinear, CodedProduct
from quantgate_serve.gptq import GptqLinear, GptqSettings
from quantgate_serve.linear import SideBySide
from quantgate_serve.native.quantized import QuantizedKernels, find_quantized_kernels

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
# Rows on each side of where the kernels change their way, and of where they split.
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 25, 64, 96, 97, 200]


@pytest.fixture(scope="module")
def kernels() -> QuantizedKernels:
    found = find_quantized_kernels()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_gptq(
    *, num_in: int, num_out: int, bits: int, group: int, ordered: bool, seed: int, v2: bool = False
) -> GptqLinear:
    """Any codes, zero points and FP16 scales."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(num_in) // group
    if not ordered:
        groups = groups[torch.randperm(num_in, generator=generator)]

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).int()

    # qzeros hold whole words, so the number of outputs is rounded up and cut.
    each = 32 // bits
    width = -(-num_out // each) * each
    linear = GptqLinear(
        {
            "qweight": words(num_in * bits // 32, width),
            "qzeros": words(num_in // group, width * bits // 32),
            "scales": (torch.randn(num_in // group, width, generator=generator) * 0.02).half(),
            "g_idx": groups.int(),
        },
        torch.randn(width, generator=generator),
        GptqSettings(bits, group, zero_offset=0 if v2 else 1),
    )
    for name in ("codes", "zeros", "scales", "bias"):
        setattr(linear, name, getattr(linear, name)[..., :num_out].contiguous())
    linear.out_features = num_out
    return linear


def random_4bit(
    *, num_in: int, num_out: int, kind: str = "nf4", nested: bool, block: int, bias: bool, seed: int
) -> Any:
    """A Linear4bit as the loader leaves it."""
    torch.manual_seed(seed)
    linear = bitsandbytes.nn.Linear4bit(
        num_in, num_out, bias=bias, compute_dtype=torch.float32, quant_type=kind
    )
    weight = bitsandbytes.nn.Params4bit(
        torch.randn(num_out, num_in) * 0.05,
        requires_grad=False,
        compress_statistics=nested,
        quant_type=kind,
        blocksize=block,
    )
    linear.weight = weight.to("cpu")
    linear.support_avx512bf16_for_cpu = False
    linear.compute_type_is_set = True
    return linear.eval()


def weights_of(linear: Any) -> Tensor:
    """[in, out], by the reference's own dequantizer."""
    if isinstance(linear, GptqLinear):
        weight = torch.empty(linear.in_features, linear.out_features)
        weight[linear.order] = linear.dequantize(torch.float32)
        return weight
    found: Tensor = bitsandbytes.functional.dequantize_4bit(
        linear.weight.data, linear.weight.quant_state
    )
    return found.t()


def assert_is_that_linear(fused: nn.Module | None, reference: Any, *, rows: int) -> None:
    """Weights bit for bit, products to FP32 sums of terms in another order."""
    assert isinstance(fused, CodedLinear)
    num_in = reference.in_features
    weight = weights_of(reference)
    bias = torch.zeros(reference.out_features) if reference.bias is None else reference.bias
    assert torch.equal(fused(torch.eye(num_in)), weight + bias)
    # Few rows take another way to the same weights.
    assert torch.equal(fused(torch.eye(num_in)[-1:]), weight[-1:] + bias)
    x = torch.randn(rows, num_in)
    exact = x.double() @ weight.double() + bias
    largest = x.double().abs() @ weight.double().abs() + bias.abs()
    # One sum of `in` terms in FP32 is off by at most in * 2^-24 of the sum of their sizes.
    assert ((fused(x) - exact).abs() <= (num_in + 2) * 2**-24 * largest).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([8, 32, 64, 128]),
    num_groups=st.integers(1, 5),
    num_out=st.integers(1, 100),
    ordered=st.booleans(),
    v2=st.booleans(),
    rows=st.sampled_from(ROWS),
    seed=st.integers(0, 1000),
)
def test_gptq_computes_with_the_weights_of_the_reference(
    kernels: QuantizedKernels,
    bits: int,
    group: int,
    num_groups: int,
    num_out: int,
    ordered: bool,
    v2: bool,
    rows: int,
    seed: int,
) -> None:
    with torch.no_grad():
        reference = random_gptq(
            num_in=group * num_groups,
            num_out=num_out,
            bits=bits,
            group=group,
            ordered=ordered,
            seed=seed,
            v2=v2,
        )
        assert_is_that_linear(coded.code(reference, kernels), reference, rows=rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    block=st.sampled_from([64, 128]),
    num_blocks=st.integers(1, 5),
    num_out=st.integers(1, 100),
    bias=st.booleans(),
    rows=st.sampled_from(ROWS),
    seed=st.integers(0, 1000),
)
def test_nf4_and_fp4_compute_with_the_weights_of_bitsandbytes(
    kernels: QuantizedKernels,
    kind: str,
    nested: bool,
    block: int,
    num_blocks: int,
    num_out: int,
    bias: bool,
    rows: int,
    seed: int,
) -> None:
    with torch.no_grad():
        reference = random_4bit(
            num_in=block * num_blocks,
            num_out=num_out,
            kind=kind,
            nested=nested,
            block=block,
            bias=bias,
            seed=seed,
        )
        assert_is_that_linear(coded.code(reference, kernels), reference, rows=rows)


def test_nested_scales_reach_over_many_blocks(kernels: QuantizedKernels) -> None:
    """256 scales share an outer one: a tile meets several, and pads behind the last."""
    reference = random_4bit(num_in=1024, num_out=203, nested=True, block=64, bias=False, seed=1)
    assert len(reference.weight.quant_state.state2.absmax) > 12
    assert_is_that_linear(coded.code(reference, kernels), reference, rows=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_keep_the_type_that_holds_them(
    kernels: QuantizedKernels, dtype: torch.dtype
) -> None:
    reference = random_gptq(num_in=64, num_out=20, bits=4, group=32, ordered=True, seed=5)
    if dtype == torch.float32:
        reference.scales += 1e-6  # no FP16 number any more, as scales stored in BF16 may be
    fused = coded.code(reference, kernels)
    assert fused is not None
    assert fused.scales.dtype == dtype
    x = torch.randn(3, 64)
    torch.testing.assert_close(fused(x), reference(x), atol=1e-4, rtol=1e-5)


def test_a_zero_point_of_256_is_one(kernels: QuantizedKernels) -> None:
    """Format v1 stores a zero point minus one, so 255 means what no byte holds."""
    reference = random_gptq(num_in=32, num_out=16, bits=8, group=32, ordered=True, seed=6)
    reference.zeros.fill_(256.0)
    assert_is_that_linear(coded.code(reference, kernels), reference, rows=2)


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_a_row_s_result_depends_on_no_other_row_and_on_no_thread(
    kernels: QuantizedKernels, rows: int
) -> None:
    reference = random_4bit(num_in=512, num_out=400, nested=True, block=64, bias=True, seed=2)
    fused = coded.code(reference, kernels)
    assert fused is not None
    x = torch.randn(rows, 512)
    alone = torch.cat([fused(row) for row in x.split(1)])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = fused(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("ordered", [True, False])
def test_joined_linears_give_their_outputs_side_by_side(
    kernels: QuantizedKernels, rows: int, ordered: bool
) -> None:
    made = [
        coded.code(
            random_gptq(num_in=96, num_out=num_out, bits=4, group=32, ordered=True, seed=num_out),
            kernels,
        )
        for num_out in (70, 9, 32)
    ]
    linears = [linear for linear in made if linear is not None]
    if not ordered:
        order = torch.randperm(96)
        linears = [CodedLinear("x", linear.part, order, kernels) for linear in linears]
    joined = coded.join(linears)
    assert isinstance(joined, CodedProduct)
    x = torch.randn(2, rows, 96)
    assert torch.equal(joined(x), SideBySide(linears)(x))


@pytest.mark.parametrize("rows", [1, 4, 8, 40])
@pytest.mark.parametrize("num_out", [5, 16, 80])
def test_a_gate_multiplies_by_silu(kernels: QuantizedKernels, num_out: int, rows: int) -> None:
    pair = [
        coded.code(
            random_4bit(
                num_in=128, num_out=num_out, nested=True, block=64, bias=seed == 1, seed=seed
            ),
            kernels,
        )
        for seed in (0, 1)
    ]
    gate, up = (linear for linear in pair if linear is not None)
    gated = coded.join([gate, up], is_gated=True)
    assert gated is not None
    x = torch.randn(rows, 128) * 10  # silu from 0 to far in both directions
    expected = functional.silu(gate(x)) * up(x)
    # Two exponentials of a relative error of 2^-23 each.
    torch.testing.assert_close(gated(x), expected, atol=1e-6, rtol=1e-6)


def test_what_is_not_finite_stays_so(kernels: QuantizedKernels) -> None:
    made = [
        coded.code(
            random_gptq(num_in=32, num_out=16, bits=4, group=32, ordered=True, seed=seed), kernels
        )
        for seed in (0, 1)
    ]
    gate, up = (linear for linear in made if linear is not None)
    gated = coded.join([gate, up], is_gated=True)
    assert gated is not None
    x = torch.randn(3, 32)
    x[1, 4] = float("nan")
    y = gated(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"group": 64}, "other groups"),
        ({"bits": 8}, "other codes"),
        ({"ordered": False}, "another order"),
        ({"num_in": 256}, "another input"),
    ],
)
def test_linears_that_do_not_agree_are_not_joined(
    kernels: QuantizedKernels, other: dict[str, Any], reason: str
) -> None:
    values: dict[str, Any] = {
        "num_in": 128,
        "num_out": 32,
        "bits": 4,
        "group": 32,
        "ordered": True,
        "seed": 0,
    }
    one = coded.code(random_gptq(**values), kernels)
    two = coded.code(random_gptq(**(values | other)), kernels)
    assert one is not None
    assert two is not None
    assert coded.join([one, one]) is not None
    assert coded.join([one, two]) is None, reason
    assert coded.join([one, nn.Linear(128, 32)]) is None
    assert coded.join([one] * 4) is None
    wide = coded.code(random_gptq(**(values | {"num_out": 48})), kernels)
    assert wide is not None
    assert coded.join([one, wide], is_gated=True) is None


def test_what_the_kernels_are_not_written_for_stays_as_it_is(kernels: QuantizedKernels) -> None:
    # Blocks that reach over a row, which bitsandbytes' own kernel reads in its own way.
    odd = random_4bit(num_in=96, num_out=32, nested=True, block=64, bias=False, seed=0)
    short = random_gptq(num_in=24, num_out=8, bits=8, group=12, ordered=True, seed=0)
    half = random_4bit(num_in=64, num_out=32, nested=True, block=64, bias=False, seed=0)
    half.compute_dtype = torch.bfloat16
    plain = nn.Linear(8, 8)
    model = nn.ModuleDict({"odd": odd, "short": short, "bf16": half, "plain": plain})
    coded.replace_all(model, kernels)
    assert [*model.values()] == [odd, short, half, plain]


def test_what_inherits_from_a_known_linear_stays_as_it_is(kernels: QuantizedKernels) -> None:
    # It may compute something else: the drill plants its faults so.
    gptq = random_gptq(num_in=64, num_out=32, bits=4, group=32, ordered=True, seed=0)
    four_bit = random_4bit(num_in=64, num_out=32, nested=True, block=64, bias=False, seed=0)
    for linear in (gptq, four_bit):
        assert coded.code(linear, kernels) is not None
        linear.__class__ = type(type(linear).__name__, (type(linear),), {})
        assert coded.code(linear, kernels) is None


def test_without_kernels_nothing_is_replaced() -> None:
    linear = random_4bit(num_in=64, num_out=32, nested=True, block=64, bias=False, seed=0)
    model = nn.Sequential(linear)
    coded.replace_all(model, None)
    assert model[0] is linear


@pytest.mark.parametrize(("bits", "per_weight"), [(4, 0.5), (8, 1.0)])
def test_codes_take_the_memory_of_their_format(
    kernels: QuantizedKernels, bits: int, per_weight: float
) -> None:
    reference = random_gptq(num_in=1024, num_out=512, bits=bits, group=128, ordered=True, seed=0)
    fused = coded.code(reference, kernels)
    assert fused is not None
    assert fused.codes.nbytes == 1024 * 512 * per_weight
    # Scales in FP16 and zero points in bytes, of 128 weights each.
    rest = sum(b.nbytes for name, b in fused.named_buffers() if name not in ("codes", "bias"))
    assert rest <= 1024 * 512 / 128 * 3 + 64


def test_nested_scales_stay_nested(kernels: QuantizedKernels) -> None:
    reference = random_4bit(num_in=1024, num_out=512, nested=True, block=64, bias=False, seed=0)
    fused = coded.code(reference, kernels)
    assert fused is not None
    assert fused.scales.dtype == torch.uint8
    assert sum(b.nbytes for b in fused.buffers()) <= 1024 * 512 * (0.5 + 1 / 64 * 1.03)


def test_a_folder_is_served_by_fused_kernels_unless_they_are_switched_off(
    save_model: Callable[..., Path], config_of: Callable[..., Any], tmp_path: Path
) -> None:
    import transformers

    from quantgate_serve.config import ServerSettings
    from quantgate_serve.kernels import read_kernels
    from quantgate_serve.model_cost import read_cost
    from quantgate_serve.startup import load_for_serving

    source = save_model(config_of(transformers.LlamaConfig), dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    names, costs = {}, {}
    for mode in ("auto", "off"):
        chosen = ServerSettings.model_validate(
            {"model": tmp_path, "device": "cpu", "native_kernels": mode}
        )
        loaded = load_for_serving(tmp_path, chosen)
        found = read_kernels(loaded.model, loaded.device)
        names[mode] = {kernel.name: kernel.count for kernel in found}
        costs[mode] = read_cost(loaded.model, loaded.kv_shape)
    assert names["auto"]["quantgate fused nf4 float32"] == 2 * 7
    assert names["off"]["bitsandbytes nf4 on cpu, float32"] == 2 * 7
    assert costs["auto"] is not None
    assert costs["off"] is not None
    assert costs["auto"].layer_weights == costs["off"].layer_weights
    assert costs["auto"].step_bytes == pytest.approx(costs["off"].step_bytes, rel=0.05)
