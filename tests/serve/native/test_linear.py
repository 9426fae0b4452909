"""A native Linear gives the plain one's output, whatever else is computed beside it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from quantgate_serve.native.layer import LayerKernels, find_kernels
from quantgate_serve.native.linear import FEWEST_LANES, NativeLinear, alternate, can_multiply, stack

pytestmark = pytest.mark.skipif(
    (kernels := find_kernels()) is None or kernels.lanes < FEWEST_LANES,
    reason="no C compiler or no AVX2 here",
)

MakePair = Callable[..., tuple[nn.Linear, NativeLinear]]

# FP32 sums of 80 terms in another order.
TOLERANCE = 2e-6


@pytest.fixture(params=[1, 2, 5], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="kernels")
def _kernels() -> LayerKernels:
    found = find_kernels()
    assert found is not None
    return found


@pytest.fixture
def make_pair(kernels: LayerKernels) -> MakePair:
    def make(num_out: int, *, bias: bool) -> tuple[nn.Linear, NativeLinear]:
        torch.manual_seed(num_out)
        plain = nn.Linear(80, num_out, bias=bias).requires_grad_(False)
        return plain, NativeLinear(plain.weight, plain.bias, kernels)

    return make


# One panel and a half, one and two panels to a tile, the last tile and group short, many groups.
@pytest.mark.parametrize("rows", [1, 3, 6, 7, 14, 15, 28, 29, 48, 49, 98, 99, 300])
@pytest.mark.parametrize(("num_out", "bias"), [(16, True), (32, False), (48, True), (208, False)])
def test_it_gives_the_plain_one_s_output(
    num_out: int, bias: bool, rows: int, make_pair: MakePair
) -> None:
    plain, native = make_pair(num_out, bias=bias)
    x = torch.randn(rows, 80)
    assert torch.allclose(native(x), plain(x), atol=TOLERANCE)


def test_no_row_depends_on_the_others_nor_on_the_number_of_threads(make_pair: MakePair) -> None:
    _, native = make_pair(208, bias=True)
    x = torch.randn(120, 80, generator=torch.Generator().manual_seed(3))
    together = native(x)
    for rows in (slice(0, 1), slice(3, 20), slice(60, 120)):
        assert torch.equal(native(x[rows]), together[rows])
    torch.set_num_threads(3)
    assert torch.equal(native(x), together)


def test_no_rows_give_none(make_pair: MakePair) -> None:
    assert make_pair(32, bias=False)[1](torch.empty(0, 80)).shape == (0, 32)


def test_rows_that_do_not_lie_one_after_another_are_taken_too(make_pair: MakePair) -> None:
    plain, native = make_pair(32, bias=False)
    x = torch.randn(80, 6).t()
    assert torch.allclose(native(x), plain(x), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.zeros(32, 7), True),
        (torch.zeros(36, 7), False),
        (torch.zeros(32, 7, dtype=torch.bfloat16), False),
    ],
)
def test_outputs_must_fill_vectors_in_fp32(
    weight: torch.Tensor, expected: bool, kernels: LayerKernels
) -> None:
    assert can_multiply(weight, kernels) is expected


@pytest.mark.parametrize("lanes", [8, 16])
def test_alternating_rows_come_in_vectors_of_each(lanes: int) -> None:
    first, second = torch.arange(2 * lanes), torch.arange(100, 100 + 2 * lanes)
    pieces = [part.tolist() for part in (*first.split(lanes), *second.split(lanes))]
    found = alternate(first, second, lanes).tolist()
    assert found == [*pieces[0], *pieces[2], *pieces[1], *pieces[3]]


def test_a_bias_that_one_of_the_stacked_lacks_is_zero() -> None:
    weight = torch.ones(2, 3)
    assert stack([(weight, None), (weight, None)])[1] is None
    found, bias = stack([(weight, torch.ones(2)), (weight, None)])
    assert found.shape == (4, 3)
    assert bias is not None
    assert bias.tolist() == [1, 1, 0, 0]


def test_without_avx2_torch_multiplies(
    kernels: LayerKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "lanes", 4)
    assert not can_multiply(torch.zeros(32, 7), kernels)
