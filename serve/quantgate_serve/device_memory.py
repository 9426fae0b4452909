"""How much memory of its device the engine has held, and what torch's allocator met."""

import torch

from quantgate_serve.memory import peak_resident_bytes
from quantgate_serve.metrics import EngineGauges


def read_memory(gauges: EngineGauges, device: torch.device) -> None:
    """Note the most memory held on `device` so far: resident on the CPU, reserved on CUDA."""
    if device.type != "cuda":
        gauges.peak_memory_bytes = peak_resident_bytes()
        return
    gauges.peak_memory_bytes = int(torch.cuda.max_memory_reserved(device))
    stats = torch.cuda.memory_stats(device)
    gauges.cuda_alloc_retries = int(stats.get("num_alloc_retries", 0))
    gauges.cuda_ooms = int(stats.get("num_ooms", 0))


def free_device_bytes(device: torch.device) -> int | None:
    """What no process holds of a CUDA device; None on the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
