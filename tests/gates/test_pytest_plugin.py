"""`pytest gates/` on stored measurements: what passes, fails, errs, and is never skipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest_plugins = "pytester"

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUN = HERE / "data" / "run"


@pytest.fixture
def gates(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder whose gates/ is the project's own."""
    (pytester.path / "gates").mkdir()
    for name in ("conftest.py", "test_release.py"):
        shutil.copy(ROOT / "gates" / name, pytester.path / "gates" / name)
    return pytester


def judge(gates: pytest.Pytester, policy: str, *options: str) -> pytest.RunResult:
    return gates.runpytest_inprocess(
        "gates",
        "-p",
        "no:cacheprovider",
        f"--quantgate-run={RUN}",
        f"--quantgate-policy={HERE / 'policies' / policy}.yaml",
        *options,
    )


def test_a_policy_passes_on_the_measurements(gates: pytest.Pytester) -> None:
    result = judge(gates, "passes", "-v")
    result.assert_outcomes(passed=6)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        [
            "quantgate: *run, policy passes (*passes.yaml)",
            "*test_gate[[]bf16::orders[]] PASSED*",
            "*test_gate[[]int8::errors[]] PASSED*",
            "*quantgate decisions*",
            "APPROVED      bf16: all 3 gates pass",
            "APPROVED      int8: all 3 gates pass",
        ]
    )


def test_another_policy_fails_on_the_same_measurements(gates: pytest.Pytester) -> None:
    result = judge(gates, "fails")
    result.assert_outcomes(passed=4, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "FAIL         int8 orders  quality/orders.exact_match  -3.25 pt < -1 pt*",
            "judged under *fails.yaml, which is not the policy that was measured for",
            "APPROVED      bf16: all 2 gates pass",
            "not approved  int8: orders is FAIL",
        ]
    )
    # The verdict's line is the whole message: no traceback of the plugin.
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*pytest_plugin.py:*")


def test_inconclusive_fails_and_invalid_is_an_error(gates: pytest.Pytester) -> None:
    result = judge(gates, "undecided")
    result.assert_outcomes(passed=5, failed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at setup of test_gate[[]int8::oom[]]*",
            "INVALID      int8 oom  stability/oom.count  not measured: the server died*server.log",
            "INCONCLUSIVE int8 errors*would decide*",
            "not approved  int8: errors is INCONCLUSIVE; oom is INVALID",
        ]
    )


def test_inconclusive_can_be_reported_as_xfail_but_never_passes(gates: pytest.Pytester) -> None:
    result = judge(gates, "undecided", "--quantgate-inconclusive=xfail")
    result.assert_outcomes(passed=5, xfailed=1, errors=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["not approved  int8: *"])


def test_only_the_named_variants_are_judged(gates: pytest.Pytester) -> None:
    result = judge(gates, "undecided", "--quantgate-variants=bf16")
    result.assert_outcomes(passed=3)
    result.stdout.no_fnmatch_line("*int8*")


def test_an_unknown_variant_is_a_usage_error(gates: pytest.Pytester) -> None:
    result = judge(gates, "passes", "--quantgate-variants=bf16,int9")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(['*"int9" is not in *expected some of bf16, int8; did you mean*'])


def test_the_policy_of_the_run_is_the_default(gates: pytest.Pytester) -> None:
    result = gates.runpytest_inprocess("gates", "-p", "no:cacheprovider", f"--quantgate-run={RUN}")
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines([f"quantgate: {RUN}, policy passes*"])


def test_a_policy_that_was_edited_in_the_run_is_a_usage_error(gates: pytest.Pytester) -> None:
    run = gates.path / "my run"
    shutil.copytree(RUN, run)
    policy = run / "policy.yaml"
    policy.write_text(policy.read_text(encoding="utf-8") + "# looser\n", encoding="utf-8")
    result = gates.runpytest_inprocess("gates", "-p", "no:cacheprovider", f"--quantgate-run={run}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*policy.yaml: not the policy that was measured for*"])


def test_no_run_is_a_usage_error_that_says_what_to_type(gates: pytest.Pytester) -> None:
    result = gates.runpytest_inprocess("gates", "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*pytest gates/ --quantgate-run runs/<release-id>*"])


def test_a_gate_suite_without_our_conftest_is_not_skipped_either(
    gates: pytest.Pytester,
) -> None:
    (gates.path / "gates" / "conftest.py").unlink()
    result = gates.runpytest_inprocess("gates", "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.no_fnmatch_line("* skipped*in *s*")


def test_gates_without_the_plugin_say_how_to_install_it(gates: pytest.Pytester) -> None:
    result = gates.runpytest_inprocess("gates", "-p", "no:quantgate", "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*plugin is not loaded*make setup*"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("measurements.json", "{", "*measurements.json:1: not JSON*"),
        ("policy.yaml", "polcy: x", '*policy.yaml:1: unknown key "polcy"*'),
    ],
)
def test_files_that_cannot_be_read_are_a_usage_error_with_their_line(
    gates: pytest.Pytester, name: str, text: str, message: str
) -> None:
    shutil.copytree(RUN, gates.path / "run")
    (gates.path / "run" / name).write_text(text)
    result = gates.runpytest_inprocess("gates", "-p", "no:cacheprovider", "--quantgate-run=run")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_a_run_without_measurements_is_a_usage_error(gates: pytest.Pytester) -> None:
    (gates.path / "run").mkdir()
    shutil.copy(RUN / "policy.yaml", gates.path / "run")
    result = gates.runpytest_inprocess("gates", "-p", "no:cacheprovider", "--quantgate-run=run")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*run/measurements.json: cannot be read: No such file*"])


def test_junit_carries_the_numbers_of_every_item(gates: pytest.Pytester) -> None:
    report = gates.path / "junit.xml"
    judge(gates, "undecided", f"--junitxml={report}")
    root = ET.parse(report).getroot()
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert len(cases) == 7
    found = {
        entry.get("name"): entry.get("value")
        for entry in cases["test_gate[int8::orders]"].iter("property")
    }
    assert found["measured"] == "-3.25 pt"
    assert found["limit"] == ">= -6 pt"
    assert found["n"] == "400"
    assert str(found["ci"]).startswith("-5.")
    assert cases["test_gate[int8::oom]"].find("error") is not None
    assert cases["test_gate[int8::errors]"].find("failure") is not None
    assert root.find(".//skipped") is None


def test_other_projects_see_nothing_of_the_plugin(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_theirs(): pass")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*quantgate decisions*")
    result.stdout.no_fnmatch_line("quantgate:*")


def test_a_hostile_folder_with_our_names_does_not_shadow_the_package(
    gates: pytest.Pytester,
) -> None:
    for name in ("harness", "serve", "gates"):
        (gates.path / name).mkdir(exist_ok=True)
        (gates.path / name / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    (gates.path / "gates" / "__init__.py").unlink()
    judge(gates, "passes").assert_outcomes(passed=6)


def test_judging_imports_no_torch_and_the_plugin_alone_imports_nothing_heavy() -> None:
    heavy = "('torch', 'transformers', 'mlflow', 'numpy', 'scipy', 'pydantic', 'yaml')"
    script = f"""
import sys
import quantgate.pytest_plugin
early = [name for name in {heavy} if name in sys.modules]
import pytest
code = pytest.main(["{ROOT / "gates"}", "-q", "-p", "no:cacheprovider",
                    "-p", "no:hypothesispytest", "--quantgate-run={RUN}"])
late = [name for name in ("torch", "transformers", "mlflow") if name in sys.modules]
print("RESULT", early, late, int(code))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert "RESULT [] [] 0" in done.stdout
