"""Whether a second engine has room beside the first, while weights are replaced."""

from pathlib import Path

import psutil

from quantgate_serve.channel import Loaded
from quantgate_serve.config import ServerSettings

# A process with torch in it, and on CUDA its context.
_RUNTIME_BYTES = 512 * 1024**2
# Loading holds some tensors twice: as they were stored and as they are computed with.
_LOADING_FACTOR = 1.5


def fits_beside(loaded: Loaded, old: ServerSettings, new: ServerSettings) -> str | None:
    """None if `new` can load while `old` serves as `loaded`; else why not.

    The new weights are taken to be to the old ones as their files are, the KV cache to be as large.
    """
    now = loaded.metrics.now
    ratio = _file_bytes(new.model) / max(1, _file_bytes(old.model))
    needed = int(now.weight_bytes * ratio * _LOADING_FACTOR) + now.kv_bytes + _RUNTIME_BYTES
    free = loaded.free_device_bytes
    if free is None:
        free = psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"a second engine needs about {needed >> 20} MiB, and {free >> 20} MiB are free"


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
