"""int8.c is done without where there is no compiler or no VNNI."""

import logging
import platform
import shutil
from pathlib import Path

import pytest

from quantgate_serve.native import int8, library
from quantgate_serve.native.int8 import Int8Kernels, find_int8_kernels
from quantgate_serve.native.library import KernelsUnavailableError, build_library


@pytest.mark.skipif(
    shutil.which("cc") is None or platform.machine() != "x86_64", reason="no C compiler for x86-64"
)
def test_a_cpu_without_vnni_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["-march=x86-64" if flag == "-march=native" else flag for flag in library._FLAGS]
    monkeypatch.setattr(library, "_FLAGS", tuple(flags))
    path = build_library("cc", tmp_path, int8.SOURCE)
    with pytest.raises(KernelsUnavailableError, match="needs a CPU with AVX-512 and VNNI"):
        Int8Kernels(path)


def test_without_a_compiler_there_are_no_kernels_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    find_int8_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert find_int8_kernels() is None
    finally:
        find_int8_kernels.cache_clear()
    assert "no native kernels for LLM.int8, torch computes instead" in caplog.text


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "int8.so"
    path.write_text("no library", encoding="utf-8")
    with pytest.raises(KernelsUnavailableError, match="cannot be loaded"):
        Int8Kernels(path)
