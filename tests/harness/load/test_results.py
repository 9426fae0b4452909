"""From blocks to measurements, and when a run may not be believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import MeasurementError
from quantgate.load.blocks import BURST, STEADY, block_path, write_block
from quantgate.load.client import PhaseRecord, RequestRecord
from quantgate.load.results import (
    ArmLoad,
    absolute_latency,
    compare_arms,
    read_arm,
    why_not_believed,
)
from quantgate.measure import Latencies, Missing, PairedBlocks


def request(at_ms: float, latency_ms: float, **changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "index": 0,
        "scheduled_ms": at_ms,
        "sent_ms": at_ms,
        "first_token_ms": None,
        "done_ms": at_ms + latency_ms,
        "prompt_tokens": 3,
        "output_tokens": 10,
        "queue_ms": None,
        "error": None,
    }
    return RequestRecord(**(values | changes))


def phase(*requests: RequestRecord, cpu: float = 0.1, duration_ms: float = 1000.0) -> PhaseRecord:
    return PhaseRecord(requests=requests, duration_ms=duration_ms, client_cpu_share=cpu)


def steady(latency_ms: float = 20.0, *, cpu: float = 0.1, **changes: Any) -> PhaseRecord:
    """Twenty requests, far enough apart to be alone."""
    rows = [request(1000.0 * (n + 1), latency_ms, **changes) for n in range(20)]
    return phase(*rows, cpu=cpu)


def arm(*blocks: PhaseRecord, name: str = "int8", burst: PhaseRecord | None = None) -> ArmLoad:
    first = burst or phase(request(0, 5), request(0, 9))
    return ArmLoad(arm=name, blocks=tuple({BURST: first, STEADY: block} for block in blocks))


@pytest.mark.parametrize(("share", "is_believed"), [(0.79, True), (0.8, True), (0.81, False)])
def test_a_client_that_used_most_of_a_core_may_be_what_was_measured(
    share: float, is_believed: bool
) -> None:
    reason = why_not_believed(arm(steady(), steady(cpu=share)))
    assert (reason is None) is is_believed
    if reason:
        assert "int8: the load client used 81% of a core (limit 80%)" in reason


@pytest.mark.parametrize(
    ("delay_ms", "latency_ms", "is_believed"),
    [
        (5.0, 20.0, True),  # 5 ms are always allowed
        (5.5, 20.0, False),
        (10.0, 100.0, True),  # a tenth of the median
        (10.5, 100.0, False),
    ],
)
def test_requests_sent_late_mean_that_the_client_lost_its_schedule(
    delay_ms: float, latency_ms: float, is_believed: bool
) -> None:
    rows = [request(1000.0 * n, latency_ms, sent_ms=1000.0 * n + delay_ms) for n in range(1, 21)]
    reason = why_not_believed(arm(phase(*rows)))
    assert (reason is None) is is_believed
    if reason:
        assert "could not keep its schedule" in reason


@pytest.mark.parametrize(("extra_ms", "is_believed"), [(90.0, True), (100.0, True), (110.0, False)])
def test_requests_in_flight_that_more_than_double_mean_a_saturated_server(
    extra_ms: float, is_believed: bool
) -> None:
    # Two in flight through the second third of the arrivals, three and a bit through the last.
    second = [request(100, 100), request(100, 100)]
    last = [request(200, 100)] * 3 + [request(200, extra_ms / 2), request(200, extra_ms / 2)]
    reason = why_not_believed(arm(phase(request(0, 10), *second, *last, request(300, 5))))
    assert (reason is None) is is_believed
    if reason:
        assert "requests in flight grew 2.0-fold" in reason or "grew 2.1-fold" in reason


def test_growth_of_less_than_one_request_in_flight_is_no_saturation() -> None:
    rows = [request(0, 10), request(100, 10), request(200, 90), request(300, 5)]
    assert why_not_believed(arm(phase(*rows))) is None


def test_filling_an_empty_server_is_no_saturation() -> None:
    rows = [request(0, 1), request(100, 100), request(100, 100), request(200, 100), request(300, 5)]
    assert why_not_believed(arm(phase(*rows))) is None


def test_blocks_are_compared_by_throughput_and_p95() -> None:
    champion = arm(steady(20.0), steady(10.0), name="champion")
    candidate = arm(
        steady(40.0), steady(30.0), burst=phase(request(0, 5), request(0, 9), duration_ms=500.0)
    )
    throughput, latency = compare_arms(champion, candidate, source="s")
    assert isinstance(throughput, PairedBlocks)
    assert (throughput.champion, throughput.candidate) == ((20.0, 20.0), (40.0, 40.0))
    assert isinstance(latency, PairedBlocks)
    assert (latency.champion, latency.candidate) == ((20.0, 10.0), (40.0, 30.0))


def test_a_failed_request_gives_no_tokens_and_is_infinitely_late() -> None:
    rows = [request(1000.0 * (n + 1), 20.0) for n in range(19)]
    failed = request(20_000.0, 1.0, error="HTTP 500: no")
    one = arm(phase(*rows, failed), burst=phase(request(0, 5), request(0, 5, error="no")))
    assert one.output_tok_per_s() == [10.0]
    # 19 of 20 answered: the 95th percentile is still an answered one.
    assert one.e2e_p95_ms() == [20.0]
    assert (one.num_errors, one.num_requests) == (2, 22)
    two = arm(phase(*rows[:-1], failed, failed))
    assert two.e2e_p95_ms() == [None]
    measured = absolute_latency(one, source="s")
    assert isinstance(measured, Latencies)
    assert (len(measured.values), measured.failed) == (19, 1)


def test_a_block_that_failed_leaves_no_ratio() -> None:
    failed = arm(steady(), steady(error="no"), burst=phase(request(0, 5, error="no")))
    for champion, candidate in (
        (arm(steady(), steady()), failed),
        (failed, arm(steady(), steady())),
    ):
        for measurement in compare_arms(champion, candidate, source="s"):
            assert isinstance(measurement, Missing)
            assert "too many of its requests failed" in measurement.reason


@pytest.mark.parametrize("whose", ["champion", "candidate"])
def test_latency_that_may_not_be_believed_is_missing_and_throughput_stays(whose: str) -> None:
    arms = {"champion": arm(steady(), name="champion"), "candidate": arm(steady())}
    arms[whose] = arm(steady(cpu=0.9), name=whose)
    throughput, latency = compare_arms(**arms, source="s")
    assert isinstance(throughput, PairedBlocks)
    assert isinstance(latency, Missing)
    assert latency.reason.startswith(f"{whose}: the load client")


def test_an_absolute_latency_that_may_not_be_believed_is_missing() -> None:
    assert isinstance(absolute_latency(arm(steady(cpu=0.9)), source="s"), Missing)


def test_an_arm_is_read_back_as_it_was_written_and_a_missing_block_is_an_error(
    tmp_path: Path,
) -> None:
    written = arm(
        phase(request(1, 2, queue_ms=0.5, first_token_ms=1.5), request(3, 4, error="no")),
        steady(),
    )
    for block, phases in enumerate(written.blocks):
        write_block(block_path(tmp_path, "int8", block), phases)
    assert read_arm(tmp_path, "int8", 2) == written
    with pytest.raises(MeasurementError, match="int8: 1 of 3 blocks were not measured"):
        read_arm(tmp_path, "int8", 3)
