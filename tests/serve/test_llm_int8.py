"""LLM.int8 without bitsandbytes' autograd gives bitsandbytes' numbers, bit for bit."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantgate_serve.llm_int8 import Int8Linear, can_replace, replace_all

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """bitsandbytes warns at each call that it casts to FP16."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def linear_of(*, num_in: int, num_out: int, bias: bool, threshold: float) -> Any:
    """A Linear8bitLt as it is when a checkpoint has been loaded."""
    torch.manual_seed(num_in * 1000 + num_out)
    made = bitsandbytes.nn.Linear8bitLt(
        num_in, num_out, bias=bias, has_fp16_weights=False, threshold=threshold
    )
    weight = torch.randn(num_out, num_in) * 0.05
    scales = weight.abs().amax(1)
    codes = (weight * 127 / scales.unsqueeze(1)).round().to(torch.int8)
    made.weight = bitsandbytes.nn.Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
    )
    return made.eval()


def rows_of(*shape: int, seed: int, num_outliers: int) -> Tensor:
    """FP32 inputs below 5.9 except for `num_outliers` values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).clamp_(-5.9, 5.9)
    places = torch.randperm(x.numel(), generator=generator)[:num_outliers]
    x.view(-1)[places] = torch.tensor([6.0, -9.5, 700.0, -6.01])[torch.arange(len(places)) % 4]
    return x


@torch.no_grad()
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 40),
    # Up to 1040 channels sums are exact in FP32, too: so bitsandbytes multiplies without AVX-512.
    num_in=st.sampled_from([7, 64, 96, 1024]),
    num_out=st.sampled_from([1, 5, 64, 200]),
    bias=st.booleans(),
    threshold=st.sampled_from([0.0, 6.0]),
    num_outliers=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_every_bit_is_that_of_bitsandbytes(
    num_rows: int,
    num_in: int,
    num_out: int,
    bias: bool,
    threshold: float,
    num_outliers: int,
    seed: int,
) -> None:
    theirs = linear_of(num_in=num_in, num_out=num_out, bias=bias, threshold=threshold)
    x = rows_of(num_rows, num_in, seed=seed, num_outliers=num_outliers)
    expected = theirs(x.clone())
    assert can_replace(theirs)
    assert torch.equal(Int8Linear.of(theirs)(x), expected)


@torch.no_grad()
def test_a_batch_of_sequences_is_its_rows() -> None:
    theirs = linear_of(num_in=64, num_out=48, bias=True, threshold=6.0)
    x = rows_of(3, 5, 64, seed=1, num_outliers=2)
    y = Int8Linear.of(theirs)(x)
    assert y.shape == (3, 5, 48)
    assert torch.equal(y, theirs(x.clone()))


@torch.no_grad()
def test_a_row_that_is_not_finite_hides_no_outlier_of_another() -> None:
    theirs = linear_of(num_in=64, num_out=48, bias=False, threshold=6.0)
    x = rows_of(4, 64, seed=2, num_outliers=0)
    x[1, 3], x[1, 4] = float("nan"), 8.0
    x[2, 9] = float("inf")
    assert torch.equal(Int8Linear.of(theirs)(x)[[0, 3]], theirs(x.clone())[[0, 3]])


@pytest.mark.parametrize(
    ("capability", "kind"), [("AVX512", "Int8Linear"), ("AVX2", "Linear8bitLt")]
)
def test_only_linears_of_llm_int8_are_replaced_and_only_where_torch_multiplies_int8_fast(
    capability: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    four = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(64, 64),
            "int8": linear_of(num_in=64, num_out=48, bias=True, threshold=6.0),
            "nf4": four,
        }
    )
    replace_all(model)
    kinds = {name: type(module).__name__ for name, module in model.items()}
    assert kinds == {"plain": "Linear", "int8": kind, "nf4": "Linear4bit"}
    assert not can_replace(bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=True))
