"""What a process leaves out of its imports, though it is installed, and how it takes in the rest.

transformers imports what it finds: torch into a front that only tokenises, torchao and scipy into
an engine that has no use for either. Both cost every start seconds and every server memory.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# For formats and losses that are neither served nor scored. Without them a process that runs or
# outlines a model starts with 0.75 s of CPU time and 47 MiB less.
UNUSED_BY_MODELS = ("torchao", "scipy")


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Have `names` look as if they were not installed while the block runs.

    Who imports one gets a ModuleNotFoundError: Python takes None in sys.modules so. What is
    imported already stays. transformers remembers for good what it did not find.
    """
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        # typeshed knows modules only.
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def uncollected() -> Iterator[None]:
    """Have the garbage collector rest while the block imports, and pass over all of it later.

    torch and transformers make 600,000 objects that stay; looking through them again and again is
    a seventh of their import's CPU time. Every object there is counts as lasting after the block.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
