"""What a process of the server leaves out of its imports, though it is installed.

transformers imports what it finds: torch into a front that only tokenises, torchao and scipy into
an engine that has no use for either. Both cost every start seconds and every server memory.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
