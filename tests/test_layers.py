"""The import rules of docs/architecture.md, read from the source with ast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUANTGATE = ROOT / "harness" / "quantgate"
SERVER = ROOT / "serve" / "quantgate_serve"

PURE = (
    "measure.py", "measurements_file.py", "units.py", "spec.py", "gate.py", "policy.py",
    "policy_sections.py", "finding.py", "resolution.py", "verdict.py", "verdicts_file.py",
    "statistics",
)  # fmt: skip
HEAVY = ("torch", "transformers", "mlflow", "bitsandbytes", "gptqmodel", "datasets", "evaluate")
OFFLINE_USER = "quality/teacher.py"


def modules_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def imported_names(path: Path, *, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of every import statement in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def offenders(paths: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for line, name in imported_names(path)
        if any(name == word or name.startswith(word + ".") for word in forbidden)
    ]


def pure_modules() -> list[Path]:
    return [path for path in modules_of(QUANTGATE) if path.relative_to(QUANTGATE).parts[0] in PURE]


def test_relative_imports_are_not_used_so_that_the_rules_below_see_every_import() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules_of(QUANTGATE) + modules_of(SERVER)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_the_server_imports_nothing_of_the_harness() -> None:
    assert offenders(modules_of(SERVER), ("quantgate",)) == []


def test_the_harness_imports_two_modules_of_the_server_and_its_teacher_a_third() -> None:
    allowed = ("quantgate_serve.config", "quantgate_serve.imports")
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules_of(QUANTGATE)
        for line, name in imported_names(path)
        if name.split(".")[0] == "quantgate_serve"
        and not name.startswith(allowed)
        and not (
            path.relative_to(QUANTGATE).as_posix() == OFFLINE_USER
            and name.startswith("quantgate_serve.offline")
        )
    ]
    assert found == []


def test_the_pure_core_imports_no_framework() -> None:
    assert pure_modules(), "the pure core was not found"
    assert offenders(pure_modules(), HEAVY) == []


def test_only_the_record_s_store_imports_mlflow() -> None:
    others = [path for path in modules_of(QUANTGATE) if path != QUANTGATE / "record_store.py"]
    assert offenders(others, ("mlflow",)) == []


@pytest.mark.parametrize(
    "name", ["pytest_plugin.py", *sorted(path.name for path in QUANTGATE.glob("cli*.py"))]
)
def test_the_edges_import_nothing_heavy_at_import_time(name: str) -> None:
    heavy = (*HEAVY, "numpy", "scipy", "aiohttp", "pyarrow")
    found = [
        f"{name}:{line} imports {module}"
        for line, module in imported_names(QUANTGATE / name, top_level_only=True)
        if module.split(".")[0] in heavy
    ]
    assert found == []


def test_only_promote_names_the_serving_config_as_a_place_to_write() -> None:
    others = [
        path
        for path in modules_of(QUANTGATE)
        if path.name != "promote.py" and "write_serving_config" in path.read_text(encoding="utf-8")
    ]
    assert [path.relative_to(ROOT).as_posix() for path in others] == []


@pytest.mark.parametrize("name", ["utils.py", "helpers.py", "common.py", "misc.py"])
def test_no_module_is_named_for_nothing(name: str) -> None:
    assert [p for p in modules_of(QUANTGATE) + modules_of(SERVER) if p.name == name] == []
