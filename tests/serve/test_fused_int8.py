"""LLM.int8 by kernels in C gives bitsandbytes' numbers, bit for bit, outliers or not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from quantgate_serve import fused_int8, huge_pages
from quantgate_serve.fused_int8 import FusedInt8Gate, FusedInt8Linear, FusedInt8Product
from quantgate_serve.kernels import read_kernels
from quantgate_serve.llm_int8 import Int8Linear
from quantgate_serve.native.int8 import Int8Kernels, find_int8_kernels

pytestmark = pytest.mark.skipif(
    find_int8_kernels() is None, reason="no C compiler, or another CPU than int8.c is for"
)


@pytest.fixture(scope="module")
def kernels() -> Int8Kernels:
    found = find_int8_kernels()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def linear_of(
    *, num_in: int, num_out: int, bias: bool = False, threshold: float = 6.0, seed: int = 0
) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    scales = torch.rand(num_out, generator=generator)
    offset = torch.randn(num_out, generator=generator) if bias else None
    return Int8Linear(codes, scales, offset, threshold=threshold)


def rows_of(num_rows: int, num_in: int, *, num_outliers: int, seed: int) -> Tensor:
    """Rows of any size, some of them all zero, and `num_outliers` values of 6 and beyond."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_in, generator=generator).clamp_(-5.9, 5.9)
    x *= 10.0 ** torch.randint(-6, 1, (num_rows, 1), generator=generator)
    x[torch.rand(num_rows, generator=generator) < 0.1] = 0
    places = torch.randperm(x.numel(), generator=generator)[:num_outliers]
    x.view(-1)[places] = torch.tensor([6.0, -9.5, 700.0, -6.01])[torch.arange(len(places)) % 4]
    return x


def of_bitsandbytes(linear: Int8Linear) -> Any:
    """A Linear8bitLt with the same weights, as it is when a checkpoint has been loaded."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        has_fp16_weights=False,
        threshold=linear.threshold,
    )
    made.weight = bitsandbytes.nn.Int8Params(
        linear.codes,
        requires_grad=False,
        has_fp16_weights=False,
        CB=linear.codes,
        SCB=linear.scales,
    )
    made.bias = None if linear.bias is None else nn.Parameter(linear.bias)
    return made.eval()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    num_rows=st.sampled_from([1, 2, 7, 8, 9, 16, 17, 40]),
    # torch._int_mm reads beyond a single channel.
    num_in=st.integers(2, 130) | st.sampled_from([256, 1000, 1024]),
    num_out=st.integers(1, 100),
    bias=st.booleans(),
    threshold=st.sampled_from([0.0, 6.0, 5.999]),
    num_outliers=st.integers(0, 6) | st.integers(0, 400),
    seed=st.integers(0, 1000),
)
def test_every_bit_is_that_of_torch_s(
    kernels: Int8Kernels,
    num_rows: int,
    num_in: int,
    num_out: int,
    bias: bool,
    threshold: float,
    num_outliers: int,
    seed: int,
) -> None:
    with torch.no_grad():
        reference = linear_of(
            num_in=num_in, num_out=num_out, bias=bias, threshold=threshold, seed=seed
        )
        x = rows_of(num_rows, num_in, num_outliers=num_outliers, seed=seed)
        assert torch.equal(FusedInt8Linear(reference, kernels)(x), reference(x))


def test_bitsandbytes_gives_the_same(kernels: Int8Kernels) -> None:
    theirs = of_bitsandbytes(linear_of(num_in=96, num_out=40, bias=True))
    x = rows_of(9, 96, num_outliers=3, seed=4)
    expected = theirs(x.clone())
    model = nn.Sequential(theirs)
    fused_int8.fuse_all(model, None)
    assert model[0] is theirs
    fused_int8.fuse_all(model, kernels)
    assert isinstance(model[0], FusedInt8Linear)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_add_up_exactly(kernels: Int8Kernels, sign: int) -> None:
    """Beyond what 16 bits, and FP32, hold exactly."""
    num_in = 4099
    codes = torch.full((19, num_in), 127 * sign, dtype=torch.int8)
    codes[3, 5] = 1
    reference = Int8Linear(codes, torch.ones(19), None, threshold=6.0)
    x = torch.full((7, num_in), 3.0)
    x[2] = -3.0
    assert torch.equal(FusedInt8Linear(reference, kernels)(x), reference(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_what_fp16_does_not_hold_is_left_to_torch(
    kernels: Int8Kernels, value: float, threshold: float
) -> None:
    reference = linear_of(num_in=64, num_out=20, bias=True, threshold=threshold)
    x = rows_of(5, 64, num_outliers=1, seed=3)
    x[1, 7] = value
    fused = FusedInt8Linear(reference, kernels)
    torch.testing.assert_close(fused(x), reference(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_outliers", [0, 4])
@pytest.mark.parametrize("threads", [1, 2])
def test_joined_linears_give_their_outputs_side_by_side(
    kernels: Int8Kernels, num_outliers: int, threads: int
) -> None:
    references = [
        linear_of(num_in=512, num_out=num_out, bias=True, seed=num_out) for num_out in (300, 33, 80)
    ]
    joined = fused_int8.join([FusedInt8Linear(one, kernels) for one in references])
    assert isinstance(joined, FusedInt8Product)
    x = rows_of(12, 512, num_outliers=num_outliers, seed=1).view(3, 4, 512)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = joined(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, torch.cat([one(x) for one in references], dim=-1))


@pytest.mark.parametrize("num_outliers", [5, 40])
@pytest.mark.parametrize("sizes", [(299, 128, 512), (1, 2, 3), (96, 96)])
def test_with_one_row_outliers_are_added_as_to_each_linear_alone(
    kernels: Int8Kernels, sizes: tuple[int, ...], num_outliers: int
) -> None:
    """MKL adds up in another order where a matrix does not begin at a cache line."""
    references = [linear_of(num_in=256, num_out=size, seed=size) for size in sizes]
    joined = fused_int8.join([FusedInt8Linear(one, kernels) for one in references])
    assert joined is not None
    for seed in range(20):
        x = rows_of(1, 256, num_outliers=num_outliers, seed=seed)
        assert torch.equal(joined(x), torch.cat([one(x) for one in references], dim=-1))


@pytest.mark.parametrize("num_outliers", [0, 4])
@pytest.mark.parametrize("num_out", [48, 129])
def test_a_gate_multiplies_by_torch_s_silu(
    kernels: Int8Kernels, num_out: int, num_outliers: int
) -> None:
    gate, up = (linear_of(num_in=96, num_out=num_out, seed=seed) for seed in (1, 2))
    gated = fused_int8.join_gate(FusedInt8Linear(gate, kernels), FusedInt8Linear(up, kernels))
    assert isinstance(gated, FusedInt8Gate)
    x = rows_of(7, 96, num_outliers=num_outliers, seed=1)
    assert torch.equal(gated(x), functional.silu(gate(x)) * up(x))


def test_only_fused_linears_that_agree_are_joined(kernels: Int8Kernels) -> None:
    one = FusedInt8Linear(linear_of(num_in=96, num_out=40), kernels)
    wide = FusedInt8Linear(linear_of(num_in=100, num_out=40), kernels)
    strict = FusedInt8Linear(linear_of(num_in=96, num_out=40, threshold=3.0), kernels)
    for other in (wide, strict, nn.Linear(96, 40)):
        assert fused_int8.join([one, other]) is None
        assert fused_int8.join_gate(one, other) is None
    assert fused_int8.join([one] * 4) is None


def test_every_linear_of_a_model_is_replaced_once(kernels: Int8Kernels) -> None:
    model = nn.Sequential(linear_of(num_in=1024, num_out=2048), nn.Linear(8, 8))
    fused_int8.fuse_all(model, None)
    assert isinstance(model[0], Int8Linear)
    fused_int8.fuse_all(model, kernels)
    kinds = [type(module) for module in model.modules()]
    assert kinds == [nn.Sequential, FusedInt8Linear, nn.Linear]
    names = [kernel.name for kernel in read_kernels(model, torch.device("cpu"))]
    assert names == ["quantgate fused LLM.int8 on cpu, outliers beyond 6", "torch Linear float32"]
    x = rows_of(3, 1024, num_outliers=2, seed=0)
    before = model[0](x)
    huge_pages.collapse_weights(model)
    assert torch.equal(model[0](x), before)


def test_codes_are_kept_once(kernels: Int8Kernels) -> None:
    reference = linear_of(num_in=1024, num_out=512)
    fused = FusedInt8Linear(reference, kernels)
    assert torch.equal(fused.unfused().codes, reference.codes)
    assert sum(buffer.nbytes for buffer in fused.buffers()) == 1024 * 512 + 512 * 8
