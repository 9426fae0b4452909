"""The pipeline end to end on real parts, in miniature."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

from quantgate.errors import ArtifactError, UsageError
from quantgate.load.stage import CHAMPION_ARM
from quantgate.measure import Binomial, Clustered, Latencies, Missing, PairedBinary, Scalar
from quantgate.measurements_file import read_measurements
from quantgate.policy import load_policy
from quantgate.progress import Silent
from quantgate.release import ReleaseResult, judge_stored, measure_release
from quantgate.release_folder import MEASURING, RECORDED, ReleaseFolder, releases
from quantgate.resolution import why_too_fine
from quantgate.verdict import Outcome
from quantgate.verdicts_file import read_verdicts

if TYPE_CHECKING:
    from conftest import MiniProject


def test_a_release_writes_every_file_that_the_next_stage_reads(
    mini_release: ReleaseResult,
) -> None:
    folder = mini_release.folder
    for path in (folder.policy, folder.measurements, folder.verdicts):
        assert path.is_file()
    for variant in ("source", "bf16", "int4-nf4"):
        assert folder.items(variant, "order-total").is_file()
    assert folder.distribution("int4-nf4").is_file()
    assert (folder.load / "group-0" / CHAMPION_ARM / "block-03.parquet").is_file()
    assert folder.read_state()["stage"] == RECORDED


def test_every_metric_has_a_value_of_the_kind_its_gates_need(mini_release: ReleaseResult) -> None:
    measured = read_measurements(mini_release.folder.measurements).variants["int4-nf4"]
    kinds = {
        "quality/order-route.exact_match": PairedBinary,
        "validity/order-total.finished": Binomial,
        "quality/kl_nats.mean": Clustered,
        "quality/top1_agreement.rate": Clustered,
        "quality/served_kl_nats.mean": Clustered,
        "quality/served_logprob_difference_nats.max": Scalar,
        "quality/noise_floor_kl_nats.mean": Clustered,
        "perf/e2e_ms.p95": Latencies,
        "memory/peak_bytes.max": Scalar,
        "stability/oom.count": Scalar,
        "stability/error.rate": Binomial,
    }
    found = {metric: type(measured.measurements[metric]) for metric in kinds}
    # On a busy machine the load client may be late, which is Missing and never a number.
    assert found["perf/e2e_ms.p95"] in (Latencies, Missing)
    assert found | {"perf/e2e_ms.p95": Latencies} == kinds


def test_the_reference_was_asked_twice_and_no_gate_is_finer_than_its_noise(
    mini_release: ReleaseResult,
) -> None:
    folder = mini_release.folder
    for name in ("order-total", "order-route", "served"):
        assert folder.rerun("source", name).is_file()
    floors = read_measurements(folder.measurements).noise_floors
    for gate in load_policy(folder.policy).gates:
        assert why_too_fine(gate, floors) is None
        if gate.metric.startswith(("quality/", "validity/")):
            floor = floors[gate.metric]
            assert isinstance(floor, Scalar)
            assert floor.source.startswith("source/noise_floor/")


def test_what_each_part_of_the_quality_stage_took_is_kept(mini_release: ReleaseResult) -> None:
    seconds = mini_release.folder.read_state()["quality_seconds"]
    assert seconds.keys() == {"source", "all variants", "bf16", "int4-nf4"}
    assert set(seconds["bf16"]) < set(seconds["source"])
    for part in ("order-total", "order-total again", "served", "served again", "noise floors"):
        assert seconds["source"][part] > 0
    assert seconds["all variants"].keys() == {"distribution"}


def test_the_server_says_of_every_variant_what_offline_scoring_says(
    mini_release: ReleaseResult,
) -> None:
    for measured in read_measurements(mini_release.folder.measurements).variants.values():
        worst = measured.measurements["quality/served_logprob_difference_nats.max"]
        assert isinstance(worst, Scalar)
        # FP32 sums in another order.
        assert 0 < worst.value < 1e-3


def test_quantizing_to_four_bits_changes_the_distribution_more_than_a_cast(
    mini_release: ReleaseResult,
) -> None:
    variants = read_measurements(mini_release.folder.measurements).variants

    def mean_kl(name: str) -> float:
        kl = variants[name].measurements["quality/kl_nats.mean"]
        assert isinstance(kl, Clustered)
        return sum(kl.totals) / sum(kl.counts)

    assert 0 < mean_kl("bf16") < mean_kl("int4-nf4")


def test_both_arms_of_a_block_replayed_the_same_requests(mini_release: ReleaseResult) -> None:
    group = mini_release.folder.load / "group-0"
    columns = ["phase", "index", "scheduled_ms", "prompt_tokens", "output_tokens"]
    for block in range(4):
        name = f"block-{block:02d}.parquet"
        champion = pq.read_table(group / CHAMPION_ARM / name, columns=columns)
        candidate = pq.read_table(group / "int4-nf4" / name, columns=columns)
        assert champion.equals(candidate)


def test_a_champion_that_no_ratio_gate_compares_has_no_second_server(
    mini_release: ReleaseResult,
) -> None:
    assert not (mini_release.folder.load / "group-0" / "bf16").exists()
    verdicts = {v.gate_id: v for v in mini_release.verdicts.decision("bf16").verdicts}  # type: ignore[union-attr]
    assert verdicts["errors"].outcome is Outcome.PASS


def test_judging_again_gives_the_same_verdicts(release_copy: MiniProject) -> None:
    release = newest(release_copy)
    before = release.verdicts.read_bytes()
    judge_stored(release)
    assert release.verdicts.read_bytes() == before


def test_a_policy_that_was_edited_in_the_release_folder_judges_nothing(
    release_copy: MiniProject,
) -> None:
    release = newest(release_copy)
    before = release.verdicts.read_bytes()
    text = release.policy.read_text(encoding="utf-8").replace("max: 0.0005 nats", "max: 9 nats")
    release.policy.write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"not the policy that was measured for.*--policy FILE"):
        judge_stored(release)
    assert release.verdicts.read_bytes() == before


def test_a_release_cut_short_goes_on_where_it_stopped(release_copy: MiniProject) -> None:
    release = newest(release_copy)
    release.update_state(stage=MEASURING)
    release.measurements.unlink()
    last = release.load / "group-0" / "int4-nf4" / "block-03.parquet"
    kept = release.load / "group-0" / "int4-nf4" / "block-02.parquet"
    last.unlink()
    kept_bytes = kept.read_bytes()

    again = measure_release(release_copy.request(), Silent())

    assert again.release_id == release.release_id
    assert last.is_file()
    assert kept.read_bytes() == kept_bytes
    assert read_measurements(again.measurements).variants.keys() == {"bf16", "int4-nf4"}


def test_a_variant_whose_bytes_changed_is_refused(release_copy: MiniProject) -> None:
    weights = next(release_copy.runs.glob("store/variants/int4-nf4-*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"digest mismatch: model\.safetensors \(changed\)"):
        measure_release(release_copy.request(), Silent())


def test_a_golden_set_edited_after_locking_is_invalid(release_copy: MiniProject) -> None:
    items = release_copy.root / "golden_sets" / "order-route" / "items.jsonl"
    items.write_text(items.read_text(encoding="utf-8").replace("Which", "Whose", 1), "utf-8")
    result = judge_stored(measure_release(release_copy.request(), Silent()))
    for decision in result.decisions:
        verdict = next(v for v in decision.verdicts if v.gate_id == "route")
        assert verdict.outcome is Outcome.INVALID
        assert "differs from its lock in the items (1 differ" in verdict.reason
        assert not decision.approved


def test_an_unknown_variant_on_the_command_line_is_named(mini_project: MiniProject) -> None:
    request = dataclasses.replace(mini_project.request(), variants=["int3"])
    with pytest.raises(UsageError, match="int3: the policy has bf16, int4-nf4"):
        measure_release(request, Silent())


def test_stored_verdicts_are_what_was_decided(mini_release: ReleaseResult) -> None:
    assert read_verdicts(mini_release.folder.verdicts) == mini_release.verdicts


def newest(project: MiniProject) -> ReleaseFolder:
    return next(releases(project.runs))
