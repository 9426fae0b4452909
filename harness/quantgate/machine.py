"""What a release ran on: hardware, system, package versions, the commit and its cleanliness."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = (
    "quantgate", "torch", "transformers", "bitsandbytes", "gptqmodel", "optimum", "mlflow",
    "datasets", "evaluate", "numpy", "scipy",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Facts that decide whether two releases may be compared; what is not known is left out."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions_of(_PACKAGES),
    }
    if gpus := gpu_names():
        facts["gpus"] = gpus
    if commit := _git("rev-parse", "HEAD"):
        facts["commit"] = commit
        facts["is_dirty"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return facts


def gpu_names() -> list[str]:
    """Names of the NVIDIA devices; empty where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def processor_of(device: str) -> str:
    """The name of what computes on a device: other processors have other kernels."""
    if device == "cpu":
        return _cpu_name()
    names, (_, _, index) = gpu_names(), device.partition(":")
    position = int(index or 0)
    return names[position] if position < len(names) else device


def choose_device(wanted: str) -> str:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if wanted == "cuda":
        return "cuda:0"
    if wanted != "auto":
        return wanted
    return "cuda:0" if gpu_names() else "cpu"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
