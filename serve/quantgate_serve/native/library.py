"""Compiles C once for this CPU, keeps the result, and calls layer.c; or says why torch must do.

torch's own threads are used: a second OpenMP runtime would spin against the first one's. So the
kernels are linked with the runtime that torch has loaded, and there are none where that is unknown.

Shapes: T tokens, N query heads, K key heads, D head dim, C hidden size.
"""

import ctypes
import hashlib
import logging
import platform
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantgate_serve.kv.storage import KVStorage

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("layer.c", "linear.c", "decoder.c", "quantized.c"))
CACHE = Path.home() / ".cache" / "quantgate"
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fPIC")
_TIMEOUT_S = 60
# What layer.c is written for.
LANES = 16
MAX_ROWS = 32
MAX_HEAD_DIM = 256

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "attend": [_POINTER] * 3
    + [_INT, _POINTER]
    + [_INT] * 4
    + [_POINTER] * 5
    + [_INT, _FLOAT, _INT],
    "rotate": [_POINTER, _INT, _POINTER, _POINTER] + [_INT] * 6,
    "add_norm": [_POINTER] * 4 + [_INT, _INT, _FLOAT, _INT],
    "multiply": [_POINTER] * 4 + [_INT] * 4,
    "decode": [_POINTER, _POINTER, _INT, _POINTER],
}


class KernelsUnavailableError(Exception):
    """The kernels cannot be compiled or loaded here."""


class LayerKernels:
    """The functions of the C sources over tensors, all FP32 on the CPU, with torch's threads."""

    def __init__(self, path: Path) -> None:
        """`path` is the compiled library.

        Raises:
            KernelsUnavailableError: it cannot be loaded.
        """
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelsUnavailableError(f"{path} cannot be loaded: {error}") from error
        self._attend = _function(library, "attend")
        self._rotate = _function(library, "rotate")
        self._add_norm = _function(library, "add_norm")
        self._multiply = _function(library, "multiply")
        # decoder.c's structures by address: see decoder.py.
        self.decode = _function(library, "decode")
        self.decode.restype = _INT

    def attend(
        self,
        kv: KVStorage,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        slots: Tensor,
        pages: Tensor,
        blocks: Tensor,
        scale: float,
    ) -> Tensor:
        """Store `key` and `value` [T, K, D] in `slots` [T], attend with `query` [T, N, D].

        `pages` and `blocks` as in `NativeStep`. All three may be parts of one tensor.

        Returns:
            [T, N, D], contiguous.
        """
        tokens, num_heads, head_dim = query.shape
        if not _have_one_stride(query, key, value):
            joined = torch.cat((query, key, value), dim=1)
            value_from = num_heads + key.shape[1]
            query, key = joined[:, :num_heads], joined[:, num_heads:value_from]
            value = joined[:, value_from:]
        output = query.new_empty(query.shape)
        self._attend(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            query.stride(0),
            output.data_ptr(),
            tokens,
            num_heads,
            key.shape[1],
            head_dim,
            kv.keys[layer].data_ptr(),
            kv.values[layer].data_ptr(),
            slots.data_ptr(),
            pages.data_ptr(),
            blocks.data_ptr(),
            len(blocks),
            scale,
            torch.get_num_threads(),
        )
        return output

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, is_paired: bool) -> None:
        """Rotate `x` [T, heads, D] in place, by `cos` and `sin` [T, D / 2] of one stride."""
        tokens, heads, head_dim = x.shape
        self._rotate(
            x.data_ptr(),
            x.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.stride(0),
            tokens,
            heads,
            head_dim,
            is_paired,
            torch.get_num_threads(),
        )

    def add_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add `delta` to `hidden` [T, C] in place; its RMS norm. All contiguous, C of lanes."""
        normed = torch.empty_like(hidden)
        self._add_norm(
            hidden.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            normed.data_ptr(),
            *hidden.shape,
            eps,
            torch.get_num_threads(),
        )
        return normed

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
        """x W^T + b, [T, out]: `x` [T, in] contiguous, `weight` in linear.c's panels."""
        tokens, depth = x.shape
        result = x.new_empty(tokens, num_outputs)
        self._multiply(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            result.data_ptr(),
            tokens,
            depth,
            num_outputs,
            torch.get_num_threads(),
        )
        return result


def can_attend(kv: KVStorage, num_heads: int) -> bool:
    """Whether layer.c is written for this cache and this many query heads."""
    shape = kv.shape
    return (
        kv.device.type == "cpu"
        and shape.dtype == torch.float32
        and kv.page_size == LANES
        and shape.head_dim % LANES == 0
        and shape.head_dim <= MAX_HEAD_DIM
        and num_heads // shape.num_kv_heads <= MAX_ROWS
    )


@cache
def find_kernels() -> LayerKernels | None:
    """The kernels for this machine, compiled if need be; None, and a line in the log, if not."""
    try:
        return LayerKernels(build_library("cc", CACHE))
    except KernelsUnavailableError as error:
        _log.warning("no native kernels, torch computes instead: %s", error)
        return None


def build_library(compiler: str, folder: Path, *sources: Path) -> Path:
    """Compile `sources`, the layers' if none, into `folder`, unless that was done for this CPU.

    Raises:
        KernelsUnavailableError: no compiler, no OpenMP runtime to share, or a failed compilation.
    """
    runtime = torch_s_own(openmp_runtimes(), Path(torch.__file__).parent)
    if runtime is None:
        raise KernelsUnavailableError("which OpenMP runtime is torch's cannot be told")
    version = _run(compiler, "--version")
    sources = sources or _SOURCES
    texts = [path.read_text(encoding="utf-8") for path in [*sources, *sorted(_FOLDER.glob("*.h"))]]
    facts = "\n".join([*texts, version, *_FLAGS, str(runtime), _describe_cpu()])
    target = folder / f"{sources[0].stem}-{hashlib.sha256(facts.encode()).hexdigest()[:20]}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            made = [Path(name) / f"{source.stem}.o" for source in sources]
            linked = Path(name) / "linked.so"
            flags = (*_FLAGS, "-fopenmp", "-I", str(_FOLDER), "-c")

            def compile_source(source: Path, made: Path) -> None:
                _run(compiler, *flags, str(source), "-o", str(made))

            # Side by side: a first start waits for the slowest. The list raises what one raised.
            with ThreadPoolExecutor(len(sources)) as pool:
                list(pool.map(compile_source, sources, made))
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


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = _SIGNATURES[name], None
    return function


def _have_one_stride(query: Tensor, key: Tensor, value: Tensor) -> bool:
    head_dim = query.shape[-1]
    return all(
        tensor.stride(2) == 1
        and tensor.stride(1) == head_dim
        and tensor.stride(0) == query.stride(0)
        for tensor in (query, key, value)
    )


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
