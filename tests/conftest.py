"""How `make test` shares the suite out: each file to one worker, the longest first.

Two workers take two cores better than one does: much of a test is the start of a child process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from quantgate_serve.imports import uncollected

# Each worker has one core; no result depends on the number of threads, and tests of threads set it.
# Said before torch is imported, and to every child process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

RELEASE = tuple(f"tests/harness/test_{name}.py" for name in ("release", "record", "promote", "cli"))
"""Of one release, which is measured once for all of them: these go to one worker."""
LONGEST = (
    "tests/harness/drill/test_runner.py",
    *RELEASE,
    "tests/serve/test_engine_process.py",
    "tests/harness/quality/test_behaviour.py",
    "tests/harness/quality/test_served.py",
    "tests/harness/drill/test_planted_processes.py",
    "tests/harness/variants/test_gptq.py",
    "tests/serve/test_models.py",
    "tests/serve/http/test_server.py",
    "tests/harness/test_server.py",
    "tests/serve/http/test_connection.py",
)
"""Twenty seconds and more each: begun last, one worker would wait for the other."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Every worker imports all test modules, and what they import."""
    with uncollected():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    rank = {file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "release" if file in RELEASE else file

    return Scheduling(config, log)
