"""The kernels are compiled once, share torch's threads, and are done without where they must be."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantgate_serve.config import ServerSettings
from quantgate_serve.decoder import NativeNorm, ShortDecoder
from quantgate_serve.native import library
from quantgate_serve.native.decoder import NativeDecoder
from quantgate_serve.native.layer import find_kernels
from quantgate_serve.native.library import (
    KernelsUnavailableError,
    build_library,
    find,
    load_library,
    openmp_runtimes,
    torch_s_own,
)
from quantgate_serve.native_runner import NativeRunner
from quantgate_serve.request import Request
from quantgate_serve.startup import build_engine, load_for_serving

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@needs_compiler
def test_the_library_is_compiled_once_and_brings_no_threads_of_its_own(tmp_path: Path) -> None:
    first = build_library("cc", tmp_path)
    made_ns = first.stat().st_mtime_ns
    assert build_library("cc", tmp_path) == first
    assert first.stat().st_mtime_ns == made_ns
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    before = openmp_runtimes()
    load_library(first)
    assert openmp_runtimes() == before


@pytest.mark.parametrize(
    ("loaded", "torch_s"),
    [
        ([], None),
        (["/torch/lib/libgomp.so.1"], "/torch/lib/libgomp.so.1"),
        (["/torch/lib/libgomp.so.1", "/sklearn.libs/libgomp-1.so"], "/torch/lib/libgomp.so.1"),
        (["/usr/lib/libiomp5.so"], "/usr/lib/libiomp5.so"),
        (["/usr/lib/libgomp.so.1", "/sklearn.libs/libgomp-1.so"], None),
        (["/torch/lib/libgomp.so.1", "/torch/lib/libiomp5.so"], None),
    ],
)
def test_the_runtime_is_torch_s_own_or_the_only_one(loaded: list[str], torch_s: str | None) -> None:
    found = torch_s_own({Path(path) for path in loaded}, Path("/torch"))
    assert found == (None if torch_s is None else Path(torch_s))


@needs_compiler
def test_a_package_with_a_runtime_of_its_own_does_not_take_the_kernels_away() -> None:
    code = (
        "import torch, sklearn.cluster; from quantgate_serve.native.library import *; "
        "from quantgate_serve.native.layer import find_kernels; "
        "assert len(openmp_runtimes()) == 2, openmp_runtimes(); assert find_kernels() is not None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "layer.c"
    source.write_text("int answer(void) { return 42; }\n", "utf-8")
    monkeypatch.setattr(library, "_SOURCES", (source,))
    first = build_library("cc", tmp_path)
    source.write_text("int answer(void) { return 42; }\n/* changed */\n", "utf-8")
    assert build_library("cc", tmp_path) != first


def test_a_missing_compiler_is_named() -> None:
    with pytest.raises(KernelsUnavailableError, match="no-such-compiler cannot be run"):
        build_library("no-such-compiler", Path("unused"))


@needs_compiler
def test_a_source_that_does_not_compile_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "layer.c"
    broken.write_text("int f( {", "utf-8")
    monkeypatch.setattr(library, "_SOURCES", (broken,))
    folder = tmp_path / "cache"
    with pytest.raises(KernelsUnavailableError, match="error"):
        build_library("cc", folder)
    assert list(folder.iterdir()) == []


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_text("no library", encoding="utf-8")
    with pytest.raises(KernelsUnavailableError, match=r"kernels\.so cannot be loaded"):
        load_library(path)


@pytest.mark.parametrize("purpose", ["quantized Linears", "LLM.int8"])
def test_without_a_compiler_there_are_no_kernels_and_the_log_says_so(
    purpose: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with caplog.at_level(logging.WARNING):
        assert find(lambda library: library, purpose) is None
    assert f"no native kernels for {purpose}, torch computes instead: cc cannot" in caplog.text


def test_without_a_compiler_torch_computes_the_same_tokens_and_the_log_says_so(
    llama_folder: Path,
    prompts: Callable[[int], list[list[int]]],
    make_request: Callable[..., Request],
    generate: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    find_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            settings = ServerSettings(model=llama_folder, device="cpu", kv_tokens=1024)
            loaded = load_for_serving(llama_folder, settings)
            engine = build_engine(loaded, settings)
    finally:
        find_kernels.cache_clear()
    assert isinstance(loaded.model, ShortDecoder)
    assert not any(isinstance(module, NativeNorm) for module in loaded.model.modules())
    assert [record.message for record in caplog.records].count(
        "no native kernels for layers, torch computes instead: cc cannot be run: "
        "[Errno 2] No such file or directory: 'cc'"
    ) == 1
    requests = [make_request(prompt) for prompt in prompts(4)]
    engine.submit(requests)
    while engine.has_work:
        engine.step()
    for request in requests:
        assert request.output_ids == generate(llama_folder, request.prompt_ids)


@needs_compiler
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_native_kernels_are_used_unless_switched_off(mode: str, llama_folder: Path) -> None:
    settings = ServerSettings.model_validate(
        {"model": llama_folder, "device": "cpu", "kv_tokens": 1024, "native_kernels": mode}
    )
    loaded = load_for_serving(llama_folder, settings)
    engine = build_engine(loaded, settings)
    is_native = isinstance(loaded.model, NativeDecoder)
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        is_native = any(isinstance(module, NativeNorm) for module in loaded.model.modules())
    runner = engine._runner
    has_kernels = isinstance(runner, NativeRunner) or runner._kernels is not None
    assert is_native == has_kernels == (mode == "auto")
