"""What is left out of a process stays out of it, and only for as long as it was said."""

import gc
import subprocess
import sys

import pytest

from quantgate_serve.imports import uncollected, without

_FRONT = (
    "client", "engine_child", "exposition", "http.admin", "http.app", "http.connection",
    "http.service", "keys", "reload", "sharing", "structured", "tracing", "vocabulary",
)  # fmt: skip


def printed(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_nothing_that_the_front_imports_brings_torch_or_transformers_along() -> None:
    imports = "\n".join(f"import quantgate_serve.{name}" for name in _FRONT)
    heavy = "{'torch', 'transformers', 'scipy', 'pandas'}"
    assert printed(f"import sys\n{imports}\nprint({heavy} & set(sys.modules))") == "set()"


def test_what_is_left_out_is_found_again_after_the_block_and_what_was_imported_stays() -> None:
    sys.modules.pop("colorsys", None)
    with without("colorsys", "json"):
        with pytest.raises(ModuleNotFoundError):
            import colorsys
        import json
    import colorsys

    assert colorsys.ONE_THIRD
    assert json.dumps([]) == "[]"


def test_the_collector_rests_in_the_block_and_passes_over_what_it_made_afterwards() -> None:
    before = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        made: list[list[int]] = [[] for _ in range(1_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)


def test_a_collector_that_was_off_stays_off_also_after_an_import_that_fails() -> None:
    gc.disable()
    try:
        with uncollected(), pytest.raises(ModuleNotFoundError):
            import no_such_module  # noqa: F401
        assert not gc.isenabled()
    finally:
        gc.enable()
