"""The one rule at its edges, and the decision that only exactly the required passes make."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.gate import Gate
from quantgate.measure import (
    Binomial,
    Clustered,
    ClusteredRatio,
    Latencies,
    Measurement,
    Missing,
    PairedBinary,
    PairedBlocks,
    Scalar,
)
from quantgate.measurements_file import MeasurementSet, VariantMeasurements
from quantgate.policy import Policy, load_policy, required_gates
from quantgate.resolution import NoiseFloors
from quantgate.verdict import (
    Decision,
    Outcome,
    Verdict,
    baseline_of,
    decide,
    exit_code,
    judge,
    judge_release,
)

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)

PASS, FAIL, INCONCLUSIVE, INVALID = Outcome


def gate(metric: str, test: str, **fields: Any) -> Gate:
    return Gate.model_validate({"id": "g", "metric": metric, "test": test, **fields})


def judged(rule: Gate, measurement: Measurement | None) -> Verdict:
    return judge(rule, measurement, variant="v", baseline="source")


MEMORY = gate("memory/peak_bytes.max", "limit", max="2 GiB")
QUALITY = gate("quality/set.exact_match", "non_inferiority", margin="2 pt")
KL = gate("quality/kl_nats.mean", "mean", max="0.06 nats")
HEALTHY = gate("quality/kl_nats.healthy.ratio", "mean", max="1.25 x")
PERPLEXITY = gate("quality/perplexity.ratio", "mean", max="1.04 x")
TOP1 = gate("quality/top1_agreement.rate", "rate", min="90 %")
ERRORS = gate("stability/error.rate", "rate", max="1 %")
SPEED = gate("perf/output_tok_per_s.ratio", "ratio", min="0.95 x")
SLO = gate("perf/e2e_ms.p95", "percentile", percentile=95, max="0.8 s")


def scalar(value: float) -> Scalar:
    return Scalar(metric=MEMORY.metric, source="server.json", value=value, unit="B", n=9)


def paired(lost: int, won: int, n: int = 400) -> PairedBinary:
    return PairedBinary(
        metric=QUALITY.metric,
        source="set.parquet",
        both=n - lost - won,
        reference_only=lost,
        candidate_only=won,
        neither=0,
    )


def clustered(mean: float, *, spread: float = 0.0, m: int = 40, **fields: Any) -> Clustered:
    """`m` documents of 10 tokens whose means alternate around `mean`."""
    metric = fields.pop("metric", KL.metric)
    unit = fields.pop("unit", "nats")
    totals = [10 * (mean + (spread if i % 2 else -spread)) for i in range(m)]
    return Clustered(
        metric=metric,
        source="kl.parquet",
        unit=unit,
        totals=tuple(totals),
        counts=(10,) * m,
        **fields,
    )


UNEQUAL = Clustered(
    metric=KL.metric,
    source="kl.parquet",
    unit="nats",
    totals=(1.0,) * 40,
    counts=(100,) * 4 + (1,) * 36,
)


def against_healthy(ratio: float, *, m: int = 60) -> ClusteredRatio:
    """Documents of unequal divergence, of which the candidate has `ratio` times the baseline's."""
    baseline = tuple(0.5 + (i % 7) / 4 for i in range(m))
    candidate = tuple(ratio * b * (1.02 if i % 2 else 0.98) for i, b in enumerate(baseline))
    return ClusteredRatio(
        metric=HEALTHY.metric, source="kl.parquet", baseline=baseline, candidate=candidate
    )


def counted(events: int, trials: int, metric: str = ERRORS.metric) -> Binomial:
    return Binomial(metric=metric, source="load", events=events, trials=trials)


def blocks(*ratios: float) -> PairedBlocks:
    return PairedBlocks(
        metric=SPEED.metric,
        source="load",
        unit="tok/s",
        champion=(100.0,) * len(ratios),
        candidate=tuple(100 * ratio for ratio in ratios),
    )


def latencies(on_time: int, *, late: int = 0, failed: int = 0) -> Latencies:
    values = (100.0,) * on_time + (900.0,) * late
    return Latencies(metric=SLO.metric, source="load", unit="ms", values=values, failed=failed)


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        pytest.param(2.0 * 2**30 - 1, PASS, id="below"),
        pytest.param(2.0 * 2**30, PASS, id="at"),
        pytest.param(2.0 * 2**30 + 1, FAIL, id="above"),
    ],
)
def test_a_limit_passes_up_to_and_exactly_at_it(value: float, outcome: Outcome) -> None:
    assert judged(MEMORY, scalar(value)).outcome is outcome


@pytest.mark.parametrize(("value", "outcome"), [(89.9, FAIL), (90.0, PASS), (90.1, PASS)])
def test_a_smallest_value_passes_down_to_and_exactly_at_it(value: float, outcome: Outcome) -> None:
    rule = gate("perf/output_tok_per_s.mean", "limit", min="90 tok/s")
    measured = Scalar(metric=rule.metric, source="load", value=value, unit="tok/s", n=1)
    assert judged(rule, measured).outcome is outcome


@pytest.mark.parametrize(
    ("measured", "rule", "outcome"),
    [
        # non-inferiority, margin 2 pt, n = 400
        pytest.param(paired(0, 0), QUALITY, PASS, id="no difference in 400 items"),
        pytest.param(paired(3, 3), QUALITY, PASS, id="small drop excluded"),
        pytest.param(paired(0, 0, 100), QUALITY, INCONCLUSIVE, id="no difference in too few items"),
        pytest.param(paired(10, 8), QUALITY, INCONCLUSIVE, id="interval spans the margin"),
        pytest.param(paired(8, 0), QUALITY, INCONCLUSIVE, id="drop shown, estimate at the margin"),
        pytest.param(paired(9, 0), QUALITY, FAIL, id="drop shown, estimate beyond the margin"),
        pytest.param(paired(60, 5), QUALITY, FAIL, id="whole interval beyond the margin"),
        pytest.param(paired(5, 60), QUALITY, PASS, id="better than the reference"),
        # mean
        pytest.param(clustered(0.05, spread=0.001), KL, PASS, id="mean below"),
        pytest.param(
            clustered(0.0625), gate(KL.metric, "mean", max="0.0625 nats"), PASS, id="mean at"
        ),
        pytest.param(clustered(0.061, spread=0.02), KL, INCONCLUSIVE, id="mean around"),
        pytest.param(clustered(0.07, spread=0.001), KL, FAIL, id="mean above"),
        # mean, relative to a healthy quantizer
        pytest.param(against_healthy(1.2), HEALTHY, PASS, id="as healthy"),
        pytest.param(against_healthy(1.25), HEALTHY, INCONCLUSIVE, id="at 1.25"),
        pytest.param(against_healthy(1.3), HEALTHY, FAIL, id="beyond 1.25"),
        # rate, max 1 %
        pytest.param(counted(0, 299), ERRORS, PASS, id="rule of three reached"),
        pytest.param(counted(0, 298), ERRORS, INCONCLUSIVE, id="rule of three missed by one"),
        pytest.param(counted(4, 400), ERRORS, INCONCLUSIVE, id="rate at the limit"),
        pytest.param(counted(20, 400), ERRORS, FAIL, id="rate above"),
        # ratio, min 0.95 x
        pytest.param(blocks(0.99, 1.0, 1.01, 1.0), SPEED, PASS, id="ratio above"),
        pytest.param(blocks(0.9, 1.0, 0.95, 0.93), SPEED, INCONCLUSIVE, id="ratio around"),
        pytest.param(blocks(0.9, 0.91, 0.9, 0.89), SPEED, FAIL, id="ratio below"),
        # percentile, p95 at most 800 ms
        pytest.param(latencies(59), SLO, PASS, id="59 requests in time"),
        pytest.param(latencies(58), SLO, INCONCLUSIVE, id="58 requests in time are too few"),
        pytest.param(latencies(380, late=20), SLO, INCONCLUSIVE, id="exactly 5 % late"),
        pytest.param(latencies(360, late=40), SLO, FAIL, id="10 % late"),
        pytest.param(latencies(360, failed=40), SLO, FAIL, id="10 % failed"),
        pytest.param(latencies(0, failed=10), SLO, FAIL, id="everything failed"),
    ],
)
def test_the_interval_decides_and_between_is_inconclusive(
    measured: Measurement, rule: Gate, outcome: Outcome
) -> None:
    assert judged(rule, measured).outcome is outcome


@pytest.mark.parametrize(
    ("events", "outcome"), [(950, PASS), (915, INCONCLUSIVE), (900, INCONCLUSIVE), (850, FAIL)]
)
def test_a_smallest_rate_is_judged_from_below(events: int, outcome: Outcome) -> None:
    assert judged(TOP1, counted(events, 1000, TOP1.metric)).outcome is outcome


@pytest.mark.parametrize(
    ("measured", "rule"),
    [
        (paired(10, 8), QUALITY),
        (clustered(0.059, spread=0.02), KL),
        (
            clustered(0.0005, spread=0.3, unit="x", metric=PERPLEXITY.metric, transform="exp"),
            PERPLEXITY,
        ),
        (counted(2, 400), ERRORS),
        (counted(915, 1000, TOP1.metric), TOP1),
        (blocks(0.9, 1.0, 0.97, 0.99), SPEED),
        (latencies(96, late=4), SLO),
    ],
)
def test_inconclusive_names_a_larger_n_that_would_decide(measured: Any, rule: Gate) -> None:
    verdict = judged(rule, measured)
    assert verdict.outcome is INCONCLUSIVE
    assert verdict.n_required is not None
    assert verdict.n_required > verdict.n == measured.n
    assert f"n={verdict.n_required:,} would decide" in verdict.line()


def test_inconclusive_at_the_limit_says_that_no_n_decides() -> None:
    verdict = judged(ERRORS, counted(4, 400))
    assert verdict.n_required is None
    assert "no n decides" in verdict.line()


def test_a_decided_verdict_names_no_required_n() -> None:
    assert judged(ERRORS, counted(0, 400)).n_required is None
    assert judged(ERRORS, counted(40, 400)).n_required is None


@pytest.mark.parametrize(
    ("rule", "measured", "reason"),
    [
        (MEMORY, None, "not measured"),
        (
            MEMORY,
            Missing(metric=MEMORY.metric, reason="server ran out of memory", source="server.log"),
            "not measured: server ran out of memory",
        ),
        (MEMORY, counted(0, 400), "wrong measurement: stability/error.rate"),
        (
            SLO,
            Scalar(metric=SLO.metric, source="x", value=1.0, unit="ms", n=1),
            "cannot judge Scalar",
        ),
        (
            gate("quality/set.f1", "non_inferiority", margin="1 pt"),
            clustered(0.0, unit="1", metric="quality/set.f1"),
            "cannot judge Clustered (not paired)",
        ),
        (
            gate("quality/set.f1", "non_inferiority", margin="1 pt", sequential=True),
            clustered(0.0, unit="1", metric="quality/set.f1", paired=True),
            'test "sequential non_inferiority" cannot judge Clustered',
        ),
        (KL, clustered(0.01, m=29), "too few samples: 29 clusters, at least 30 needed"),
        (KL, UNEQUAL, "40 clusters of unequal size, which weigh like 4.7, at least 30 needed"),
        (HEALTHY, against_healthy(1.0, m=12), "too few samples: 12 clusters"),
        (SPEED, blocks(1.0, 1.0, 1.0), "too few samples: 3 blocks, at least 4 needed"),
        (
            gate(ERRORS.metric, "rate", max="1 %", min_n=500),
            counted(0, 499),
            "too few samples: 499, and the gate asks for 500",
        ),
    ],
)
def test_absence_is_invalid_with_its_reason(
    rule: Gate, measured: Measurement | None, reason: str
) -> None:
    verdict = judged(rule, measured)
    assert verdict.outcome is INVALID
    assert reason in verdict.reason
    assert verdict.estimate is None
    assert verdict.line().startswith("INVALID      v g  ")
    assert verdict.reason in verdict.line()


def test_as_many_samples_as_the_gate_asks_for_are_judged() -> None:
    rule = gate(ERRORS.metric, "rate", max="1 %", min_n=500)
    assert judged(rule, counted(0, 500)).outcome is PASS


def test_a_percentile_gate_made_without_its_percentile_is_invalid() -> None:
    rule = SLO.model_copy(update={"percentile": None})
    assert judged(rule, latencies(100)).reason == "gate g names no percentile"


def test_values_are_given_in_the_unit_of_the_limit() -> None:
    verdict = judged(MEMORY, scalar(3 * 2**29))
    assert (verdict.estimate, verdict.limit, verdict.unit) == (1.5, 2.0, "GiB")
    verdict = judged(SLO, latencies(400))
    assert (verdict.estimate, verdict.upper, verdict.unit) == (0.1, 0.1, "s")
    verdict = judged(QUALITY, paired(4, 0))
    assert (verdict.estimate, verdict.limit, verdict.unit) == (-1.0, -2.0, "pt")


def test_a_perplexity_ratio_is_the_exponential_of_the_mean_difference() -> None:
    measured = clustered(
        0.02, spread=0.001, unit="x", metric=PERPLEXITY.metric, transform="exp", paired=True
    )
    verdict = judged(PERPLEXITY, measured)
    assert verdict.outcome is PASS
    assert verdict.estimate == pytest.approx(1.0202, abs=1e-4)
    assert verdict.estimate is not None
    assert verdict.lower is not None
    assert verdict.lower < verdict.estimate


def test_a_perplexity_ratio_below_a_limit_of_zero_is_impossible_and_fails() -> None:
    rule = gate(PERPLEXITY.metric, "mean", max="-1 x")
    measured = clustered(0.0, spread=0.1, unit="x", metric=rule.metric, transform="exp")
    assert judged(rule, measured).outcome is FAIL


def test_no_fractional_difference_in_few_documents_is_not_proof() -> None:
    rule = gate("quality/set.f1", "non_inferiority", margin="2 pt")
    few = judged(rule, clustered(0.0, unit="1", metric=rule.metric, paired=True, m=100))
    many = judged(rule, clustered(0.0, unit="1", metric=rule.metric, paired=True, m=149))
    assert (few.outcome, few.n_required) == (INCONCLUSIVE, 149)
    assert many.outcome is PASS


@pytest.mark.parametrize(("drop", "outcome"), [(0.001, PASS), (0.01, INCONCLUSIVE), (0.08, FAIL)])
def test_fractional_differences_are_judged_by_cluster(drop: float, outcome: Outcome) -> None:
    rule = gate("quality/set.f1", "non_inferiority", margin="2 pt")
    measured = clustered(-drop, spread=0.001, unit="1", metric=rule.metric, paired=True, m=180)
    assert judged(rule, measured).outcome is outcome


def test_a_sequential_gate_needs_more_items_and_still_fails_what_is_broken() -> None:
    once = gate(QUALITY.metric, "non_inferiority", margin="2 pt")
    always = gate(QUALITY.metric, "non_inferiority", margin="2 pt", sequential=True)
    assert judged(once, paired(3, 3, 400)).outcome is PASS
    undecided = judged(always, paired(3, 3, 400))
    assert undecided.outcome is INCONCLUSIVE
    assert undecided.n_required is not None
    assert undecided.n_required > 400
    assert judged(always, paired(3, 3, 1200)).outcome is PASS
    assert judged(always, paired(20, 2, 60)).outcome is FAIL


def test_a_variant_that_does_not_differ_was_not_quantized() -> None:
    rule = gate(KL.metric, "mean", min="0.00001 nats")
    assert judged(rule, clustered(0.0)).outcome is FAIL
    assert judged(rule, clustered(0.001, spread=0.0002)).outcome is PASS


@pytest.mark.parametrize("lost", [0, 1, 2, 4, 8])
def test_clusters_that_lost_something_never_prove_more_than_clusters_that_lost_nothing(
    lost: int,
) -> None:
    rule = gate("quality/set.f1", "non_inferiority", margin="2 pt")

    def lower(num_lost: int) -> float:
        measured = Clustered(
            metric=rule.metric,
            source="items.parquet",
            unit="1",
            totals=(-0.2,) * num_lost + (0.0,) * (107 - num_lost),
            counts=(5,) * 107,
            paired=True,
        )
        verdict = judged(rule, measured)
        assert verdict.outcome is INCONCLUSIVE
        assert verdict.lower is not None
        return verdict.lower

    assert lower(lost + 1) < lower(lost) <= -2.76
    assert lower(lost + 1) > lower(lost) - 0.1


@PROPERTY
@given(st.integers(0, 40), st.integers(0, 40), st.integers(80, 2000))
def test_more_confidence_never_turns_undecided_into_decided(lost: int, won: int, n: int) -> None:
    loose = judged(
        gate(QUALITY.metric, "non_inferiority", margin="2 pt", confidence=0.9), paired(lost, won, n)
    )
    strict = judged(
        gate(QUALITY.metric, "non_inferiority", margin="2 pt", confidence=0.99),
        paired(lost, won, n),
    )
    if loose.outcome is INCONCLUSIVE:
        assert strict.outcome is INCONCLUSIVE
    assert {loose.outcome, strict.outcome} != {PASS, FAIL}


@pytest.mark.parametrize(
    ("verdict", "line"),
    [
        (
            judged(MEMORY, scalar(3 * 2**30)),
            "FAIL         v g  memory/peak_bytes.max  3 GiB > 2 GiB  (n=9; baseline source)  "
            "server.json",
        ),
        (
            judged(ERRORS, counted(0, 400)),
            "PASS         v g  stability/error.rate  0 % <= 1 %  (n=400; 95% bounds 0 .. 0.7461; "
            "detects 1.237 %; baseline source; 0 of 400)  load",
        ),
        (
            judged(SLO, latencies(0, failed=10)),
            "FAIL         v g  perf/e2e_ms.p95  infinite > 0.8 s  (n=10; 95% bounds infinite .. "
            "infinite; baseline source; 10 of 10 late, 10 of them failed)  load",
        ),
        (
            judge(MEMORY, None, variant="v", baseline=None),
            "INVALID      v g  memory/peak_bytes.max  not measured",
        ),
        (
            judge(
                gate("memory/peak_bytes.max", "limit", max="1000 B"),
                scalar(25_000.0),
                variant="v",
                baseline=None,
            ),
            "FAIL         v g  memory/peak_bytes.max  25,000 B > 1000 B  (n=9)  server.json",
        ),
    ],
)
def test_a_verdict_prints_as_one_line(verdict: Verdict, line: str) -> None:
    assert verdict.line() == line


def test_parts_of_a_verdict_print_for_tables() -> None:
    invalid = judged(MEMORY, None)
    assert (invalid.observed(), invalid.bounds(), invalid.allowed()) == ("–", "–", "<= 2 GiB")
    assert judged(SPEED, blocks(1.0, 1.0, 1.0, 1.0)).allowed() == ">= 0.95 x"


def test_shares_that_cancel_are_printed_as_0_and_small_values_are_not() -> None:
    verdict = judged(ERRORS, counted(0, 400))
    assert dataclasses.replace(verdict, estimate=-2.313e-17).observed() == "0 %"
    assert dataclasses.replace(verdict, estimate=1e-6).observed() == "1e-06 %"
    assert dataclasses.replace(verdict, estimate=1e-13, unit="nats").observed() == "1e-13 nats"


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([PASS, PASS], 0),
        ([PASS, FAIL, INVALID, INCONCLUSIVE], 1),
        ([PASS, INCONCLUSIVE, INVALID], 3),
        ([PASS, INCONCLUSIVE], 4),
        ([], 3),
    ],
)
def test_the_exit_code_is_that_of_the_worst_outcome(outcomes: list[Outcome], code: int) -> None:
    assert exit_code(outcomes) == code


@pytest.mark.parametrize(
    ("metric", "baseline"),
    [
        ("quality/kl_nats.mean", "source"),
        ("audit/weight_error.ratio", "source"),
        ("validity/set.finished", "source"),
        ("perf/e2e_ms.p95.ratio", "bf16"),
        ("perf/e2e_ms.p95", None),
        ("stability/error.rate", None),
    ],
)
def test_quality_is_relative_to_the_reference_and_ratios_of_speed_to_the_champion(
    metric: str, baseline: str | None
) -> None:
    assert baseline_of(metric, reference="source", champion="bf16") == baseline


POLICY = """\
policy: small
model: demo
variants: {bf16: {scheme: bf16}, int8: {scheme: int8-bnb}}
golden_sets: [set]
gates:
  - {id: quality, metric: quality/set.exact_match, test: non_inferiority, margin: 2 pt}
  - {id: memory, metric: memory/peak_bytes.max, test: limit, max: 2 GiB}
  - {id: int8-only, metric: memory/idle_bytes.max, test: limit, max: 1 GiB, schemes: [int8-bnb]}
"""


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    path = tmp_path / "small.yaml"
    path.write_text(POLICY)
    return load_policy(path)


def floor(value: float) -> Scalar:
    return Scalar(
        metric=QUALITY.metric, source="again.parquet", value=value, unit="1", n=400, note="A/A"
    )


def measured(
    reference: str = "source", scheme: str = "int8-bnb", floors: NoiseFloors | None = None
) -> MeasurementSet:
    idle = Scalar(metric="memory/idle_bytes.max", source="s", value=1.0, unit="GiB", n=1)
    entries = {
        name: VariantMeasurements(
            variant=name,
            scheme=kind,
            artifact_sha256=name,
            measurements={one.metric: one for one in (scalar(1e9), paired(0, 0), idle)},
        )
        for name, kind in (("bf16", "bf16"), ("int8", scheme))
    }
    return MeasurementSet(
        release_id="r",
        policy_sha256="0",
        reference=reference,
        champion="bf16",
        variants=entries,
        noise_floors={QUALITY.metric: floor(0.0)} if floors is None else floors,
    )


def passes(policy: Policy, variant: str) -> list[Verdict]:
    [decision] = judge_release(policy, measured(), variants=[variant])
    return list(decision.verdicts)


def test_a_variant_is_approved_by_exactly_its_required_passes(policy: Policy) -> None:
    decisions = judge_release(policy, measured())
    assert [(d.variant, d.approved, len(d.verdicts)) for d in decisions] == [
        ("bf16", True, 2),
        ("int8", True, 3),
    ]
    assert decisions[0].outcomes == (PASS, PASS)


@pytest.mark.parametrize("outcome", [FAIL, INCONCLUSIVE, INVALID])
def test_one_verdict_that_is_not_pass_is_enough_against_approval(
    policy: Policy, outcome: Outcome
) -> None:
    verdicts = passes(policy, "bf16")
    verdicts[0] = dataclasses.replace(verdicts[0], outcome=outcome)
    decision = decide(policy, "bf16", verdicts)
    assert not decision.approved
    assert decision.reasons == (f"quality is {outcome}",)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda vs: vs[1:], "no verdict for gate quality"),
        (lambda vs: [*vs, vs[0]], "2 verdicts for gate quality"),
        (
            lambda vs: [*vs, dataclasses.replace(vs[0], gate_id="extra")],
            "gate extra is not required of bf16",
        ),
        (
            lambda vs: [vs[0], dataclasses.replace(vs[1], variant="int8")],
            "the verdict of memory is about int8",
        ),
        (
            lambda vs: [vs[0], dataclasses.replace(vs[1], limit=4.0)],
            "memory was judged under another rule",
        ),
        (
            lambda vs: [vs[0], dataclasses.replace(vs[1], confidence=0.6)],
            "memory was judged under another rule",
        ),
    ],
)
def test_a_set_that_is_not_the_required_one_is_not_approved_even_if_all_pass(
    policy: Policy, edit: Any, reason: str
) -> None:
    decision = decide(policy, "bf16", edit(passes(policy, "bf16")))
    assert not decision.approved
    assert reason in decision.reasons
    assert INVALID in decision.outcomes
    assert exit_code(decision.outcomes) == 3


def test_no_verdicts_at_all_approve_nothing() -> None:
    decision = Decision(variant="v", verdicts=())
    assert not decision.approved
    assert decision.outcomes == (INVALID,)


def test_a_variant_that_was_not_measured_is_invalid_in_every_gate(policy: Policy) -> None:
    partial = measured()
    partial = dataclasses.replace(partial, variants={"bf16": partial.variants["bf16"]})
    _, int8 = judge_release(policy, partial)
    assert [v.outcome for v in int8.verdicts] == [INVALID] * len(required_gates(policy, "int8"))
    assert "does not have this variant" in int8.verdicts[0].reason


def test_a_metric_that_was_not_measured_is_invalid(policy: Policy) -> None:
    release = measured()
    bf16 = dataclasses.replace(release.variants["bf16"], measurements={})
    release = dataclasses.replace(release, variants={"bf16": bf16})
    [decision] = judge_release(policy, release, variants=["bf16"])
    assert {v.reason for v in decision.verdicts} == {"not measured"}


def test_quality_measured_against_another_reference_is_invalid(policy: Policy) -> None:
    bf16, _ = judge_release(policy, measured(reference="bf16"))
    assert [(v.gate_id, v.outcome) for v in bf16.verdicts] == [
        ("quality", INVALID),
        ("memory", PASS),
    ]
    assert bf16.verdicts[0].reason == "measured against bf16, the policy's reference is source"


def test_a_variant_measured_on_another_scheme_is_invalid(policy: Policy) -> None:
    _, int8 = judge_release(policy, measured(scheme="int4-nf4"))
    assert {v.outcome for v in int8.verdicts} == {INVALID}
    assert int8.verdicts[0].reason == "measured on scheme int4-nf4, the policy says int8-bnb"


@pytest.mark.no_cover  # tracing each line doubles what is timed here
def test_judging_a_release_of_four_variants_takes_less_than_a_second(policy: Policy) -> None:
    """The dear ones: intervals over 400 items and 120 documents, and their required n."""
    f1 = gate("quality/set.f1", "non_inferiority", margin="2 pt")
    items = clustered(-0.02, spread=0.3, unit="1", metric=f1.metric, paired=True, m=400)
    documents = clustered(0.06, spread=0.05, m=120)
    start = time.process_time()
    for _ in range(4):
        judged(f1, items)
        for _ in range(2):
            judged(KL, documents)
        for _ in range(4):
            judged(QUALITY, paired(20, 15, 1500))
        judge_release(policy, measured())
    assert time.process_time() - start < 1.0


def test_a_gate_finer_than_the_noise_floor_is_invalid_whatever_was_measured(
    policy: Policy,
) -> None:
    noisy = measured(floors={QUALITY.metric: floor(0.06)})
    for decision in judge_release(policy, noisy):
        verdict = decision.verdicts[0]
        assert (verdict.gate_id, verdict.outcome, verdict.n) == ("quality", INVALID, 400)
        assert "finer than the noise floor" in verdict.reason
        assert verdict.source == "set.parquet"
        assert not decision.approved


def test_a_gate_whose_noise_was_not_measured_is_invalid(policy: Policy) -> None:
    [decision] = judge_release(policy, measured(floors={}), variants=["bf16"])
    assert decision.verdicts[0].outcome is INVALID
    assert "the reference was not measured against itself" in decision.verdicts[0].reason


def test_what_is_not_measured_is_said_before_what_is_too_fine(policy: Policy) -> None:
    noisy = measured(scheme="int4-nf4", floors={})
    [decision] = judge_release(policy, noisy, variants=["int8"])
    assert "measured on scheme" in decision.verdicts[0].reason


def test_a_part_of_a_set_is_judged_by_sequential_gates_only() -> None:
    part = dataclasses.replace(paired(0, 0), early_stop="stopped early at 400 of 900 items")
    verdict = judged(QUALITY, part)
    assert verdict.outcome is INVALID
    assert "stopped early at 400 of 900 items" in verdict.reason
    sequential = gate("quality/set.exact_match", "non_inferiority", margin="9 pt", sequential=True)
    assert judged(sequential, part).outcome is PASS
