"""How much memory a process has held."""

import resource


def peak_resident_bytes() -> int:
    """Most resident memory of this process (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
