"""Compiles the C sources once for this CPU, keeps the result, loads it; or says why torch must do.

torch's own threads are used: a second OpenMP runtime would spin against the first one's. So the
kernels are linked with the runtime that torch has loaded, and there are none where that is unknown.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
# The longer one takes to compile, the earlier it comes.
_SOURCES = tuple(
    _FOLDER / name for name in ("linear.c", "quantized.c", "layer.c", "int8.c", "decoder.c")
)
_CACHE = Path.home() / ".cache" / "quantgate"
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fPIC")
_TIMEOUT_S = 60

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
Kernels = TypeVar("Kernels")


class KernelsUnavailableError(Exception):
    """The kernels cannot be compiled or loaded here."""


def find(kernels: Callable[[ctypes.CDLL], Kernels], purpose: str) -> Kernels | None:
    """`kernels` of the library for this CPU; None, and a line in the log, where there is none.

    `kernels` may raise a KernelsUnavailableError, too: of a CPU that they are not written for.
    """
    try:
        return kernels(load_library(build_library("cc", _CACHE)))
    except KernelsUnavailableError as error:
        _log.warning("no native kernels for %s, torch computes instead: %s", purpose, error)
        return None


def load_library(path: Path) -> ctypes.CDLL:
    """The compiled library at `path`.

    Raises:
        KernelsUnavailableError: it cannot be loaded.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailableError(f"{path} cannot be loaded: {error}") from error


def bind(function: Any, *arguments: type, result: type | None = None) -> Any:
    """`function` of a library, told what it takes and returns."""
    function.argtypes, function.restype = arguments, result
    return function


def address(tensor: Tensor | None) -> int | None:
    """Where the numbers of `tensor` lie; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def build_library(compiler: str, folder: Path) -> Path:
    """Compile the sources into one library in `folder`, unless that was done for this CPU.

    Raises:
        KernelsUnavailableError: no compiler, no OpenMP runtime to share, or a failed compilation.
    """
    runtime = torch_s_own(openmp_runtimes(), Path(torch.__file__).parent)
    if runtime is None:
        raise KernelsUnavailableError("which OpenMP runtime is torch's cannot be told")
    version = _run(compiler, "--version")
    headers = sorted(_FOLDER.glob("*.h"))
    texts = [path.read_text(encoding="utf-8") for path in [*_SOURCES, *headers]]
    facts = "\n".join([*texts, version, *_FLAGS, str(runtime), _describe_cpu()])
    target = folder / f"kernels-{hashlib.sha256(facts.encode()).hexdigest()[:20]}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            made = [Path(name) / f"{source.stem}.o" for source in _SOURCES]
            linked = Path(name) / "linked.so"
            flags = (*_FLAGS, "-fopenmp", "-I", str(_FOLDER), "-c")

            def compile_source(source: Path, made: Path) -> None:
                _run(compiler, *flags, str(source), "-o", str(made))

            # Side by side: a first start waits for the slowest. The list raises what one raised.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_source, _SOURCES, made))
            # Not -fopenmp: that would bring the compiler's own runtime.
            objects = map(str, made)
            _run(compiler, "-shared", *objects, str(runtime), "-lm", "-o", str(linked))
            linked.replace(target)
    except OSError as error:
        raise KernelsUnavailableError(f"{folder} cannot be written: {error}") from error
    return target


def openmp_runtimes() -> set[Path]:
    """The OpenMP runtimes in this process; none are found where there is no /proc."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return set()
    found = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[-.]\S*)", maps.read_text("utf-8"))
    return {Path(path) for path in found}


def torch_s_own(runtimes: set[Path], torch_folder: Path) -> Path | None:
    """Which of the loaded `runtimes` torch uses; None where that cannot be told.

    Other packages bring runtimes of their own, as scikit-learn does: torch's is the one in its
    folder, or else the only one.
    """
    own = {path for path in runtimes if path.is_relative_to(torch_folder)} or runtimes
    return next(iter(own)) if len(own) == 1 else None


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise KernelsUnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _describe_cpu() -> str:
    """What -march=native depends on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
    return "\n".join([platform.machine(), *sorted(kept)])
