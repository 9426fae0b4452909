"""`pytest gates/` judges a stored release; without one it is a usage error, never a success."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    try:
        from quantgate.pytest_plugin import require_run

        config.getoption("--quantgate-run")
    except (ImportError, ValueError) as error:
        message = "the quantgate pytest plugin is not loaded; install the project first: make setup"
        raise pytest.UsageError(message) from error
    require_run(config)
