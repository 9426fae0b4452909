"""pytest edge: judges stored measurements, one test item per variant × gate.

PASS passes, FAIL fails with the verdict's line, INVALID is an error of the set-up. Judging needs no
torch and no GPU. Nothing of quantgate is imported until `--quantgate-run` is given, because pytest
loads this module in every project of the environment it is installed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from quantgate.policy import Policy
    from quantgate.verdict import Decision, Verdict

FIXTURE = "quantgate_verdict"
NO_RUN = (
    "nothing to judge: name a release folder, for example\n"
    "  pytest gates/ --quantgate-run runs/<release-id>\n"
    "`quantgate release gates/policies/demo.cpu.yaml` makes one; nothing measured is never a pass"
)


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """What this pytest session judges: the stored release and its decisions."""

    run: Path
    policy: Policy
    measured_policy_sha256: str
    decisions: tuple[Decision, ...]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(verdict for decision in self.decisions for verdict in decision.verdicts)


_JUDGED = pytest.StashKey[JudgedRun]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("quantgate", "quantgate: judge a release")
    group.addoption(
        "--quantgate-run",
        metavar="PATH",
        help="release folder whose measurements.json is judged, for example runs/<release-id>",
    )
    group.addoption(
        "--quantgate-policy",
        metavar="PATH",
        help="policy to judge under (default: policy.yaml in the release folder)",
    )
    group.addoption(
        "--quantgate-inconclusive",
        choices=("fail", "xfail"),
        default="fail",
        help="how an INCONCLUSIVE verdict is reported (default: fail); it never passes",
    )
    group.addoption(
        "--quantgate-variants",
        metavar="A,B",
        help="judge only these variants (default: all variants of the policy)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quantgate-run"):
        config.stash[_JUDGED] = _judge_run(config)


def pytest_report_header(config: pytest.Config) -> str | None:
    judged = config.stash.get(_JUDGED, None)
    if judged is None:
        return None
    return f"quantgate: {judged.run}, policy {judged.policy.policy} ({judged.policy.path})"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if FIXTURE not in metafunc.fixturenames:
        return
    judged = metafunc.config.stash.get(_JUDGED, None)
    if judged is None:
        # The item must exist for `pytest_collection_modifyitems` to refuse it: an empty list of
        # parameters would be reported as a skip.
        metafunc.parametrize(FIXTURE, [None], ids=["no-run"], indirect=True)
        return
    ids = [f"{verdict.variant}::{verdict.gate_id}" for verdict in judged.verdicts]
    metafunc.parametrize(FIXTURE, judged.verdicts, ids=ids, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(FIXTURE in getattr(item, "fixturenames", ()) for item in items):
        require_run(config)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    judged = config.stash.get(_JUDGED, None)
    if judged is None:
        return
    terminalreporter.write_sep("=", "quantgate decisions")
    for line in _summary_lines(judged):
        terminalreporter.write_line(line)


@pytest.fixture
def quantgate_verdict(request: pytest.FixtureRequest) -> Verdict:
    """The verdict of this item. An INVALID one is an error here, before the test's own body."""
    from quantgate.report.junit import properties
    from quantgate.verdict import Outcome

    verdict: Verdict = request.param
    # Appended rather than record_property'd: that one warns under the default junit_family.
    request.node.user_properties.extend(properties(verdict))
    if verdict.outcome is Outcome.INVALID:
        pytest.fail(verdict.line(), pytrace=False)
    return verdict


def require_run(config: pytest.Config) -> None:
    """Raise a usage error (pytest's exit code 4) unless there is something to judge."""
    if _JUDGED not in config.stash:
        raise pytest.UsageError(NO_RUN)


def require_pass(verdict: Verdict, config: pytest.Config) -> None:
    """Fail the running test with the verdict's line unless the gate passes."""
    from quantgate.verdict import Outcome

    if verdict.outcome is Outcome.PASS:
        return
    may_xfail = config.getoption("--quantgate-inconclusive") == "xfail"
    if verdict.outcome is Outcome.INCONCLUSIVE and may_xfail:
        pytest.xfail(verdict.line())
    pytest.fail(verdict.line(), pytrace=False)


def _judge_run(config: pytest.Config) -> JudgedRun:
    from quantgate.errors import QuantgateError
    from quantgate.measurements_file import read_measurements
    from quantgate.policy import load_policy
    from quantgate.release_folder import ReleaseFolder
    from quantgate.verdict import judge_release

    folder: Path = config.invocation_params.dir
    run = folder / config.getoption("--quantgate-run")
    policy_option = config.getoption("--quantgate-policy")
    try:
        measurements = read_measurements(run / "measurements.json")
        if policy_option:
            policy = load_policy(folder / policy_option)
        else:
            release = ReleaseFolder(runs=run.parent, release_id=run.name)
            policy = release.own_policy(measurements)
    except QuantgateError as error:
        raise pytest.UsageError(str(error)) from error
    variants = _chosen_variants(config.getoption("--quantgate-variants"), policy)
    decisions = judge_release(policy, measurements, variants=variants)
    return JudgedRun(run, policy, measurements.policy_sha256, decisions)


def _chosen_variants(option: str | None, policy: Policy) -> list[str]:
    from quantgate.units import did_you_mean

    if option is None:
        return list(policy.variants)
    chosen = [name.strip() for name in option.split(",")]
    for name in chosen:
        if name not in policy.variants:
            known = ", ".join(policy.variants)
            raise pytest.UsageError(
                f'--quantgate-variants: "{name}" is not in {policy.path}; '
                f"expected some of {known}{did_you_mean(name, policy.variants)}"
            )
    return chosen


def _summary_lines(judged: JudgedRun) -> Iterator[str]:
    if judged.policy.sha256 != judged.measured_policy_sha256:
        yield f"judged under {judged.policy.path}, which is not the policy that was measured for"
    for decision in judged.decisions:
        if decision.approved:
            yield f"APPROVED      {decision.variant}: all {len(decision.verdicts)} gates pass"
        else:
            yield f"not approved  {decision.variant}: {'; '.join(decision.reasons)}"
