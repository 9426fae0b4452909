import platform
import shutil
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from quantgate_serve.native import library
from quantgate_serve.native.library import build_library, load_library


@pytest.fixture
def library_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CDLL]:
    """A library of the sources of those names, of all if none, for another CPU of this kind."""
    if shutil.which("cc") is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler for x86-64")

    def build(target: str, *names: str, level: str = "-O3") -> CDLL:
        if target == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            pytest.skip("this CPU has no AVX2")
        other = {"-march=native": f"-march={target}", "-O3": level}
        monkeypatch.setattr(library, "_FLAGS", [other.get(flag, flag) for flag in library._FLAGS])
        sources = [path for path in library._SOURCES if not names or path.name in names]
        monkeypatch.setattr(library, "_SOURCES", sources)
        return load_library(build_library("cc", tmp_path))

    return build
