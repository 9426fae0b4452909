"""Which release is continued, and which is begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantgate.errors import UsageError
from quantgate.files import write_json
from quantgate.policy import Policy, load_policy
from quantgate.release_folder import (
    JUDGED,
    MEASURED,
    MEASURING,
    RECORDED,
    RELEASE_NAME,
    ReleaseFolder,
    claimed,
    open_release,
    releases,
)

POLICY = Path(__file__).resolve().parents[1] / "gates" / "policies" / "passes.yaml"


@pytest.fixture
def policy() -> Policy:
    return load_policy(POLICY)


def earlier(runs: Path, name: str, **changes: object) -> ReleaseFolder:
    state = {"schema_version": 1, "stage": MEASURING, "identity": {"source": "x"}}
    write_json(runs / name / RELEASE_NAME, state | changes)
    return ReleaseFolder(runs=runs, release_id=name)


def test_a_new_release_keeps_its_policy_as_it_was_read(tmp_path: Path, policy: Policy) -> None:
    folder = open_release(tmp_path, policy, {"source": "x"})
    assert folder.policy.read_bytes() == POLICY.read_bytes()
    state = folder.read_state()
    assert (state["stage"], state["identity"]) == (MEASURING, {"source": "x"})
    assert folder.release_id.startswith(f"{policy.policy}-")


def test_the_newest_interrupted_release_of_the_same_inputs_goes_on(
    tmp_path: Path, policy: Policy
) -> None:
    earlier(tmp_path, "p-20260101-000001")
    newest = earlier(tmp_path, "p-20260101-000002")
    # A later name of another policy sorts by its time, not by its letters.
    earlier(tmp_path, "a-20260101-000003", identity={"source": "y"})
    assert open_release(tmp_path, policy, {"source": "x"}) == newest


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": {"source": "y"}},
        {"stage": MEASURED},
        {"stage": JUDGED},
        {"stage": RECORDED},
    ],
)
def test_another_input_or_a_finished_release_begins_a_new_one(
    tmp_path: Path, policy: Policy, changes: dict[str, object]
) -> None:
    before = earlier(tmp_path, "p-20260101-000001", **changes)
    assert open_release(tmp_path, policy, {"source": "x"}) != before


def test_a_release_of_another_version_does_not_stand_in_the_way_of_a_new_one(
    tmp_path: Path, policy: Policy
) -> None:
    old = earlier(tmp_path, "p-20260101-000001", schema_version=0)
    assert open_release(tmp_path, policy, {"source": "x"}) != old


def test_two_processes_do_not_measure_one_release(tmp_path: Path, policy: Policy) -> None:
    release = open_release(tmp_path, policy, {"source": "x"})
    second = claimed(open_release(tmp_path, policy, {"source": "x"}))
    with claimed(release), pytest.raises(UsageError, match="another process measures"):
        second.__enter__()
    with claimed(release):
        pass


def test_releases_are_listed_newest_first(tmp_path: Path) -> None:
    for name in ("b-20260101-000001", "a-20260101-000003", "c-20260101-000002"):
        earlier(tmp_path, name)
    (tmp_path / "store").mkdir()
    assert [r.release_id[0] for r in releases(tmp_path)] == ["a", "c", "b"]
    assert list(releases(tmp_path / "nowhere")) == []


def test_a_change_of_state_keeps_the_rest(tmp_path: Path) -> None:
    folder = earlier(tmp_path, "p-20260101-000001")
    folder.update_state(stage=MEASURED)
    assert folder.read_state()["stage"] == MEASURED
    assert folder.read_state()["identity"] == {"source": "x"}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema_version": 2}', "{}"])
def test_a_folder_that_is_no_release_is_refused(tmp_path: Path, content: str | None) -> None:
    folder = ReleaseFolder(runs=tmp_path, release_id="x")
    folder.path.mkdir()
    if content is not None:
        (folder.path / RELEASE_NAME).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=RELEASE_NAME):
        folder.read_state()
