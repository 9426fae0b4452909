"""The command line: what it prints, and which exit code a person or a CI job gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantgate.files import sha256_of_file
from quantgate.release_folder import MEASURING, ReleaseFolder, releases

if TYPE_CHECKING:
    from conftest import MiniProject


def quantgate(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantgate.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def run(release_copy: MiniProject) -> str:
    release = next(releases(release_copy.runs))
    return f"runs/{release.release_id}"


def test_judging_a_stored_release_needs_no_torch_and_exits_1_when_a_gate_failed(
    release_copy: MiniProject, run: str
) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = sys.modules['mlflow'] = None\n"
        "from quantgate.cli import main\n"
        f"sys.argv = ['quantgate', 'judge', {run!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=release_copy.root,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "APPROVED      bf16" in done.stdout
    assert "kl is FAIL" in done.stdout
    assert f"Next: quantgate promote {run} --variant bf16" in done.stdout


def test_json_is_one_document_on_stdout(release_copy: MiniProject, run: str) -> None:
    done = quantgate("judge", run, "--json", cwd=release_copy.root)
    value = json.loads(done.stdout)
    assert value["exit_code"] == done.returncode == 1
    assert value["variants"]["bf16"]["approved"] is True


def test_json_of_another_policy_is_what_that_policy_says(
    release_copy: MiniProject, run: str
) -> None:
    other = release_copy.root / "other.yaml"
    text = release_copy.policy.read_text(encoding="utf-8")
    other.write_text(text.replace("max: 0.0005 nats", "max: 9 nats"), encoding="utf-8")
    stored = (release_copy.root / run / "verdicts.json").read_bytes()
    done = quantgate("judge", run, "--policy", "other.yaml", "--json", cwd=release_copy.root)
    value = json.loads(done.stdout)
    assert value["exit_code"] == done.returncode == 0
    assert value["variants"]["int4-nf4"]["approved"] is True
    assert value["policy_sha256"] == sha256_of_file(other)
    assert (release_copy.root / run / "verdicts.json").read_bytes() == stored


def test_another_policy_judges_the_variants_that_it_has(
    release_copy: MiniProject, run: str
) -> None:
    other = release_copy.root / "other.yaml"
    text = release_copy.policy.read_text(encoding="utf-8")
    other.write_text(text.replace("int4-nf4: {scheme", "four-bits: {scheme"), encoding="utf-8")
    done = quantgate("judge", run, "--policy", "other.yaml", "--json", cwd=release_copy.root)
    assert json.loads(done.stdout)["variants"].keys() == {"bf16"}
    other.write_text(
        text.replace("int4-nf4: {scheme", "four-bits: {scheme")
        .replace("bf16: {scheme", "cast: {scheme")
        .replace("champion: bf16", "champion: cast"),
        encoding="utf-8",
    )
    done = quantgate("judge", run, "--policy", "other.yaml", cwd=release_copy.root)
    assert done.returncode == 2
    assert "judges cast, four-bits; the release measured bf16, int4-nf4." in done.stderr


def test_audit_judges_the_audit_gates_and_names_the_reports(release_copy: MiniProject) -> None:
    done = quantgate("audit", "gates/policies/mini.cpu.yaml", "--json", cwd=release_copy.root)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["exit_code"] == 0
    assert value["int4-nf4"]["verdicts"] == [{"gate": "weights", "outcome": "PASS"}]
    assert Path(release_copy.root, value["int4-nf4"]["report"]).is_file()


def test_promote_status_and_rollback_go_round(release_copy: MiniProject, run: str) -> None:
    root = release_copy.root
    done = quantgate("promote", run, "--variant", "bf16", "--reason", "test", cwd=root)
    assert done.returncode == 0, done.stderr
    assert "champion none → bf16" in done.stdout

    status = json.loads(quantgate("status", "--json", cwd=root).stdout)
    assert status["champion"]["name"] == "bf16"
    assert status["is_audit_complete"] is True

    refused = quantgate("promote", run, "--variant", "int4-nf4", cwd=root)
    assert refused.returncode == 1
    assert "int4-nf4 is not approved" in refused.stderr

    undone = quantgate("rollback", "--allow-none", cwd=root)
    assert undone.returncode == 0, undone.stderr
    assert "champion bf16 → none" in undone.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("relase",), "No such command 'relase'"),
        (("release", "nowhere.yaml"), "nowhere.yaml"),
        (("judge", "runs/nothing"), "no such release folder"),
        (("golden", "check", "nowhere", "--model", "demo"), "nowhere"),
        (("release", "policy.yaml", "--model", "nowhere/at/all"), "no such folder"),
        (("ui", "--runs", "empty"), "nothing is recorded yet"),
    ],
    ids=["command", "policy", "run", "golden set", "model", "ui"],
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(
    arguments: tuple[str, ...], message: str, tmp_path: Path, mini_project: MiniProject
) -> None:
    (tmp_path / "policy.yaml").write_bytes(mini_project.policy.read_bytes())
    done = quantgate(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_policy_with_a_wrong_unit_names_the_line_and_what_to_write(
    mini_project: MiniProject, tmp_path: Path
) -> None:
    text = mini_project.policy.read_text(encoding="utf-8").replace("max: 4 GiB}", "max: 4 ms}")
    policy = tmp_path / "wrong.yaml"
    policy.write_text(text, encoding="utf-8")
    line = next(i for i, row in enumerate(text.splitlines(), start=1) if "max: 4 ms" in row)
    done = quantgate("release", "wrong.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert f"wrong.yaml:{line}:" in done.stderr


def test_a_damaged_artifact_exits_3(release_copy: MiniProject) -> None:
    weights = next(release_copy.runs.glob("store/variants/bf16-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    done = quantgate("build", "gates/policies/mini.cpu.yaml", cwd=release_copy.root)
    assert done.returncode == 3
    assert "digest mismatch" in done.stderr


def test_ctrl_c_exits_130_and_leaves_a_release_that_goes_on(release_copy: MiniProject) -> None:
    known = {folder.release_id for folder in releases(release_copy.runs)}
    process = subprocess.Popen(
        [sys.executable, "-m", "quantgate.cli", "release", str(release_copy.policy)],
        cwd=release_copy.root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    begun = _await_new_release(release_copy.runs, known)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "goes on where this one stopped" in errors
    assert begun.read_state()["stage"] == MEASURING
    assert not begun.verdicts.exists()
    assert list(release_copy.runs.rglob("*.partial")) == []


def _await_new_release(runs: Path, known: set[str]) -> ReleaseFolder:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for folder in releases(runs):
            if folder.release_id not in known:
                return folder
        time.sleep(0.1)
    pytest.fail("the release did not begin")
