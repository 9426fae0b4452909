"""Huge pages change where memory lies, never what it holds."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from quantgate_serve import huge_pages, linear

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's huge pages")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5000])
def test_zeros_are_zeros_that_can_be_written(dtype: torch.dtype, rows: int) -> None:
    made = huge_pages.zeros((rows, 3, 128), dtype)
    assert made.shape == (rows, 3, 128)
    assert made.dtype == dtype
    assert not made.any()
    made[-1] = 7
    assert float(made.sum()) == 7 * 3 * 128


@linux
def test_zeros_lie_in_huge_pages_where_the_kernel_gives_them() -> None:
    made = huge_pages.zeros((16, 2**20), torch.float32)
    assert _huge_kib_around(made.data_ptr()) > 0 or not _kernel_gives_huge_pages()


@linux
def test_collapsed_weights_give_the_same_output() -> None:
    torch.manual_seed(0)
    packed = linear.prepare(nn.Linear(1024, 2048))
    x = torch.randn(3, 1024)
    with torch.inference_mode():
        before = packed(x)
        huge_pages.collapse_weights(packed)
        assert torch.equal(packed(x), before)


def test_a_model_without_packed_weights_is_left_alone() -> None:
    assert huge_pages.collapse_weights(nn.Linear(8, 8)) == 0


def _kernel_gives_huge_pages() -> bool:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.is_file() and "[never]" not in path.read_text(encoding="utf-8")


def _huge_kib_around(address: int) -> int:
    """AnonHugePages of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    return 0
