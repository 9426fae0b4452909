"""One item per variant × gate of the release named by --quantgate-run; the plugin makes them."""

from __future__ import annotations

import pytest

from quantgate.pytest_plugin import require_pass
from quantgate.verdict import Verdict


def test_gate(quantgate_verdict: Verdict, pytestconfig: pytest.Config) -> None:
    require_pass(quantgate_verdict, pytestconfig)
