"""int8.c is done without where there is no VNNI."""

from collections.abc import Callable
from ctypes import CDLL

import pytest

from quantgate_serve.native.int8 import Int8Kernels
from quantgate_serve.native.library import KernelsUnavailableError


def test_a_cpu_without_vnni_is_named(library_for: Callable[..., CDLL]) -> None:
    library = library_for("x86-64", "int8.c")
    with pytest.raises(KernelsUnavailableError, match="needs a CPU with AVX-512 and VNNI"):
        Int8Kernels(library)
