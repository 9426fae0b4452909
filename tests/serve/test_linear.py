"""Packed and joined Linears give what the plain ones give."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantgate_serve import linear
from quantgate_serve.linear import PackedLinear

# FP32 products of 96 terms in another order.
TOLERANCE = 2e-6


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 96, generator=torch.Generator().manual_seed(1))


def make_linear(num_out: int, *, bias: bool, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(96, num_out, bias=bias)
    made.requires_grad_(False)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_out", [1, 7, 64, 130])
def test_a_packed_linear_gives_the_plain_one_s_output(
    x: torch.Tensor, num_out: int, bias: bool
) -> None:
    plain = make_linear(num_out, bias=bias)
    packed = linear.prepare(plain)
    assert isinstance(packed, PackedLinear)
    for rows in (1, 2, 5):
        assert torch.allclose(packed(x[:rows]), plain(x[:rows]), atol=TOLERANCE)


def test_a_packed_gate_multiplies_by_silu(x: torch.Tensor) -> None:
    gate, up = make_linear(40, bias=False), make_linear(40, bias=True, seed=1)
    expected = functional.silu(gate(x)) * up(x)
    found = linear.Gated(linear.prepare(gate), linear.prepare(up))(x)
    assert torch.allclose(found, expected, atol=TOLERANCE)
    assert torch.equal(linear.Gated(gate, up)(x), expected)


def test_joined_linears_give_their_outputs_side_by_side(x: torch.Tensor) -> None:
    first, second = make_linear(8, bias=True), make_linear(4, bias=False, seed=1)
    order = torch.tensor([1, 0, 3, 2, 7, 6, 5, 4])
    joined = linear.join([first, second], [order, None])
    assert torch.allclose(joined(x), torch.cat([first(x)[:, order], second(x)], dim=1), atol=2e-6)


def test_a_weight_that_is_not_fp32_stays_plain() -> None:
    plain = make_linear(8, bias=False).to(torch.bfloat16)
    assert linear.prepare(plain) is plain
    joined = linear.join([plain, plain], [None, None])
    assert type(joined) is nn.Linear
    assert joined.weight.shape == (16, 96)


def test_a_quantized_linear_is_left_as_it_is() -> None:
    class Coded(nn.Linear):
        """Holds codes where a Linear holds weights."""

    coded = Coded(8, 8)
    assert linear.prepare(coded) is coded


def test_a_packed_linear_counts_its_weights() -> None:
    packed = linear.prepare(make_linear(130, bias=False))
    assert sum(buffer.numel() for buffer in packed.buffers()) == 96 * 130
    assert not list(packed.parameters())
