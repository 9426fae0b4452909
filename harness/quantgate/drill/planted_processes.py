"""Processes with faults in them: which model folder has which fault, by the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

_VARIABLE = "QUANTGATE_DRILL_PLANTED"


@contextmanager
def planted_processes(faults: Mapping[Path, str]) -> Iterator[None]:
    """Processes started inside the block have faults planted in the models of these folders.

    Models of other folders stay sound in the same processes. The names are those that
    planted/sitecustomize.py knows.
    """
    before = dict(os.environ)
    site = str(resources.files("quantgate") / "drill" / "planted")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (site, before.get("PYTHONPATH"))))
    os.environ[_VARIABLE] = json.dumps({str(path.resolve()): name for path, name in faults.items()})
    try:
        yield
    finally:
        for name in ("PYTHONPATH", _VARIABLE):
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
