"""Norms and rotations in C are torch's; on lesser CPUs the whole library is there, too."""

import shutil
from collections.abc import Callable, Iterator
from ctypes import CDLL

import pytest
import torch

from quantgate_serve.decoder import NativeNorm, Rotation, ShortNorm
from quantgate_serve.native.layer import LayerKernels, find_kernels
from quantgate_serve.native.linear import NativeLinear
from quantgate_serve.native.quantized import QuantizedKernels

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture
def kernels() -> Iterator[LayerKernels]:
    """With two threads, of which small tensors use one."""
    found = find_kernels()
    assert found is not None
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield found
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 3, 40, 700])  # the last one is worth a team of threads
def test_a_native_norm_equals_torch_s_and_adds_first(kernels: LayerKernels, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    hidden, delta = (torch.randn(tokens, 96, generator=generator) for _ in range(2))
    weight = torch.rand(96, generator=generator)
    native, reference = NativeNorm(weight, 1e-5, kernels), ShortNorm(weight, 1e-5)
    assert torch.allclose(native(hidden), reference(hidden), atol=1e-6)
    total = hidden + delta
    found = native(hidden, delta)
    assert torch.equal(hidden, total)
    assert torch.allclose(found, reference(total), atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("tokens", [7, 700])
@pytest.mark.parametrize("is_paired", [True, False])
def test_a_native_rotation_equals_torch_s_and_leaves_the_values(
    kernels: LayerKernels, is_paired: bool, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    heads = torch.randn(tokens, 4, 32, generator=generator)
    angles = torch.randn(tokens, 1, 32, generator=generator)  # a table as wide as a head
    cos, sin = angles.cos()[..., :16], angles.sin()[..., :16]
    before = heads.clone()
    rotated = heads[:, :3]
    expected = heads.clone()[:, :3]
    plain, native = Rotation(cos, sin, None), Rotation(cos, sin, kernels)
    if is_paired:
        expected, rotated = plain.of_pairs(expected), native.of_pairs(rotated)
    else:
        expected, rotated = plain.of_halves(expected), native.of_halves(rotated)
    assert torch.allclose(rotated, expected, atol=1e-6)
    assert torch.equal(heads[:, 3], before[:, 3])


@pytest.mark.parametrize(("target", "lanes"), [("x86-64", 4), ("x86-64-v3", 8)])
def test_a_lesser_cpu_has_every_kernel_but_those_of_int8_c(
    target: str, lanes: int, library_for: Callable[..., CDLL]
) -> None:
    library = library_for(target, level="-O0")
    kernels = LayerKernels(library)
    assert QuantizedKernels(library).lanes == lanes
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(5, 96, generator=generator) for _ in range(2))
    norm = NativeNorm(weight[0], 1e-5, kernels)
    assert torch.allclose(norm(hidden), ShortNorm(weight[0], 1e-5)(hidden), atol=1e-6)
    # One panel, two and a half, and rows in one tile, in several, in more than one group.
    for outputs, rows in ((8, 1), (16, 4), (48, 7), (80, 53), (32, 120)):
        matrix = torch.randn(outputs, 96, generator=generator)
        x = torch.randn(rows, 96, generator=generator)
        product = NativeLinear(matrix, None, kernels)(x)
        assert torch.allclose(product, x @ matrix.t(), atol=1e-4)
