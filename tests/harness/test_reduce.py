"""From a variant's files to its measurements: every metric has a value or a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantgate.audit.report import CALIBRATED_METRICS
from quantgate.audit.report import METRICS as AUDIT_METRICS
from quantgate.files import write_json
from quantgate.load.blocks import BURST, STEADY, block_path, facts_path, write_block
from quantgate.load.client import PhaseRecord, RequestRecord
from quantgate.load.results import ABSOLUTE_METRICS, RATIO_METRICS
from quantgate.load.stage import CHAMPION_ARM
from quantgate.measure import Binomial, Latencies, Measurement, Missing, PairedBlocks, Scalar
from quantgate.quality.distribution_results import METRICS
from quantgate.quality.served import METRICS as SERVED_METRICS
from quantgate.quality.stage import QualityResult
from quantgate.reduce import (
    ERROR_METRIC,
    MEMORY_METRIC,
    OOM_METRIC,
    VariantEvidence,
    reduce_variant,
)
from quantgate.release_folder import ReleaseFolder

LOAD_METRICS = {*RATIO_METRICS, *ABSOLUTE_METRICS, MEMORY_METRIC, OOM_METRIC, ERROR_METRIC}
NUM_BLOCKS = 2


@pytest.fixture
def release(tmp_path: Path) -> ReleaseFolder:
    """A release whose champion and int8 were loaded: four requests per block, one of 16 failed."""
    folder = ReleaseFolder(runs=tmp_path, release_id="r")
    for arm in (CHAMPION_ARM, "int8"):
        for block in range(NUM_BLOCKS):
            rows = [request(100.0 * n, error=None) for n in (1, 2)]
            failing = request(100.0, error="no" if (arm, block) == ("int8", 1) else None)
            path = block_path(folder.load / "group-0", arm, block)
            burst = phase(failing, request(100.0, error=None))
            write_block(path, {BURST: burst, STEADY: phase(*rows)})
            write_json(facts_path(path), {"peak_bytes": 1000 + block, "oom_count": block})
    return folder


def request(at_ms: float, *, error: str | None) -> RequestRecord:
    return RequestRecord(
        index=0,
        scheduled_ms=at_ms,
        sent_ms=at_ms,
        first_token_ms=None,
        done_ms=at_ms + 10,
        prompt_tokens=3,
        output_tokens=2,
        queue_ms=None,
        error=error,
    )


def phase(*requests: RequestRecord) -> PhaseRecord:
    return PhaseRecord(requests=requests, duration_ms=1000.0, client_cpu_share=0.1)


def reduce(
    release: ReleaseFolder, *, audits: bool = False, **changes: Any
) -> dict[str, Measurement]:
    asked = QualityResult(items={}, missing={}, oom_count=3, peak_bytes=500, num_reused=0)
    values: dict[str, Any] = {
        "name": "int8",
        "is_calibrated": False,
        "audit_failure": None,
        "golden_sets": [],
        "reference_name": "source",
        "reference": asked,
        "candidate": asked,
        "overlap": None,
        "distribution_failure": None,
        "served_failure": None,
        "noise": (),
        "load_failure": None,
        "is_champion": False,
        "num_blocks": NUM_BLOCKS,
    }
    found = reduce_variant(VariantEvidence(**(values | changes)), release)
    return {metric: m for metric, m in found.items() if metric.startswith("audit/") == audits}


def reasons(found: dict[str, Measurement]) -> set[str]:
    return {m.reason for m in found.values() if isinstance(m, Missing)}


def test_an_audit_that_was_not_made_is_missing_with_its_reason(release: ReleaseFolder) -> None:
    found = reduce(release, audits=True, audit_failure="no config.json", is_calibrated=True)
    assert found.keys() == {*AUDIT_METRICS, *CALIBRATED_METRICS}
    assert reasons(found) == {"no config.json"}
    [reason] = reasons(reduce(release, audits=True))
    assert "audit.json: not an audit" in reason


def test_a_measured_load_has_every_metric_and_the_file_it_came_from(
    release: ReleaseFolder,
) -> None:
    found = reduce(release)
    assert found.keys() == LOAD_METRICS
    assert {m.source for m in found.values()} == {"load/group-0/int8"}
    assert all(isinstance(found[metric], PairedBlocks) for metric in RATIO_METRICS)
    assert isinstance(found["perf/e2e_ms.p95"], Latencies)


def test_memory_is_the_most_of_both_stages_and_ooms_are_the_sum(release: ReleaseFolder) -> None:
    found = reduce(release)
    memory, ooms = found[MEMORY_METRIC], found[OOM_METRIC]
    assert isinstance(memory, Scalar)
    assert isinstance(ooms, Scalar)
    assert (memory.value, ooms.value) == (1001, 4)
    more = QualityResult(items={}, missing={}, oom_count=0, peak_bytes=9000, num_reused=0)
    memory = reduce(release, candidate=more)[MEMORY_METRIC]
    assert isinstance(memory, Scalar)
    assert memory.value == 9000


def test_errors_are_counted_over_all_requests(release: ReleaseFolder) -> None:
    errors = reduce(release)[ERROR_METRIC]
    assert isinstance(errors, Binomial)
    assert (errors.events, errors.trials) == (1, 8)


def test_ooms_of_a_server_that_died_while_it_was_asked_are_not_zero(
    release: ReleaseFolder,
) -> None:
    died = QualityResult(items={}, missing={}, oom_count=None, peak_bytes=0, num_reused=0)
    found = reduce(release, candidate=died)[OOM_METRIC]
    assert isinstance(found, Missing)
    assert "its count is lost" in found.reason


def test_a_load_that_failed_leaves_its_reason_under_every_metric(release: ReleaseFolder) -> None:
    found = reduce(release, load_failure="the server exited (signal SIGKILL)")
    assert found.keys() == LOAD_METRICS
    assert reasons(found) == {"the server exited (signal SIGKILL)"}


@pytest.mark.parametrize("arm", [CHAMPION_ARM, "int8"])
def test_a_missing_block_of_either_arm_leaves_no_number(release: ReleaseFolder, arm: str) -> None:
    block_path(release.load / "group-0", arm, 1).unlink()
    found = reduce(release)
    assert found.keys() == LOAD_METRICS
    assert reasons(found) == {f"{arm}: 1 of 2 blocks were not measured"}


def test_a_variant_that_was_never_loaded_says_so(release: ReleaseFolder) -> None:
    assert reasons(reduce(release, name="int4")) == {"the load stage was not run"}


def test_the_champion_has_its_own_numbers_and_no_ratio_to_itself(release: ReleaseFolder) -> None:
    found = reduce(release, name="bf16", is_champion=True)
    missing = {metric for metric, m in found.items() if isinstance(m, Missing)}
    assert missing == set(RATIO_METRICS)


def test_a_policy_without_a_workload_has_no_load_metric(release: ReleaseFolder) -> None:
    assert reduce(release, num_blocks=0) == {}


@pytest.mark.parametrize(
    ("key", "metrics"),
    [
        # The server can be compared with offline scoring whatever calibrated the variant.
        ("overlap", METRICS),
        ("distribution_failure", (*METRICS, *SERVED_METRICS)),
        ("served_failure", SERVED_METRICS),
    ],
)
def test_a_distribution_that_proves_nothing_is_missing(
    release: ReleaseFolder, key: str, metrics: tuple[str, ...]
) -> None:
    found = reduce(release, num_blocks=0, **{key: "the candidate has NaN weights"})
    assert found.keys() == set(metrics)
    assert reasons(found) == {"the candidate has NaN weights"}
