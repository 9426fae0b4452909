"""A native Linear gives the plain one's output, whatever else is computed beside it."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from quantgate_serve.native.layer import find_kernels
from quantgate_serve.native.linear import NativeLinear, alternate, can_multiply, stack

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="no C compiler or no AVX-512 here",
)

# FP32 sums of 80 terms in another order.
TOLERANCE = 2e-6


@pytest.fixture(params=[1, 2, 5], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_pair(num_out: int, *, bias: bool) -> tuple[nn.Linear, NativeLinear]:
    torch.manual_seed(num_out)
    plain = nn.Linear(80, num_out, bias=bias).requires_grad_(False)
    kernels = find_kernels()
    assert kernels is not None
    return plain, NativeLinear(plain.weight, plain.bias, kernels)


# One panel and a half, one and two panels to a tile, the last tile and group short, many groups.
@pytest.mark.parametrize("rows", [1, 7, 14, 15, 28, 29, 98, 99, 300])
@pytest.mark.parametrize(("num_out", "bias"), [(16, True), (32, False), (48, True), (208, False)])
def test_it_gives_the_plain_one_s_output(num_out: int, bias: bool, rows: int) -> None:
    plain, native = make_pair(num_out, bias=bias)
    x = torch.randn(rows, 80)
    assert torch.allclose(native(x), plain(x), atol=TOLERANCE)


def test_no_row_depends_on_the_others_nor_on_the_number_of_threads() -> None:
    _, native = make_pair(208, bias=True)
    x = torch.randn(120, 80, generator=torch.Generator().manual_seed(3))
    together = native(x)
    for rows in (slice(0, 1), slice(3, 20), slice(60, 120)):
        assert torch.equal(native(x[rows]), together[rows])
    torch.set_num_threads(3)
    assert torch.equal(native(x), together)


def test_no_rows_give_none() -> None:
    assert make_pair(32, bias=False)[1](torch.empty(0, 80)).shape == (0, 32)


def test_rows_that_do_not_lie_one_after_another_are_taken_too() -> None:
    plain, native = make_pair(32, bias=False)
    x = torch.randn(80, 6).t()
    assert torch.allclose(native(x), plain(x), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.zeros(32, 7), True),
        (torch.zeros(24, 7), False),
        (torch.zeros(32, 7, dtype=torch.bfloat16), False),
    ],
)
def test_outputs_must_come_in_sixteens_and_in_fp32(weight: torch.Tensor, expected: bool) -> None:
    assert can_multiply(weight) is expected


def test_alternating_rows_come_in_sixteens_of_each() -> None:
    first, second = torch.arange(32), torch.arange(100, 132)
    found = alternate(first, second).tolist()
    assert found == [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)]


def test_a_bias_that_one_of_the_stacked_lacks_is_zero() -> None:
    weight = torch.ones(2, 3)
    assert stack([(weight, None), (weight, None)])[1] is None
    found, bias = stack([(weight, torch.ones(2)), (weight, None)])
    assert found.shape == (4, 3)
    assert bias is not None
    assert bias.tolist() == [1, 1, 0, 0]


def test_without_avx512_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not can_multiply(torch.zeros(32, 7))
