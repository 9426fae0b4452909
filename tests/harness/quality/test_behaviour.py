"""Behaviour through the real server, end to end: a tiny policy, a sound and a broken variant."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantgate.errors import UsageError
from quantgate.measure import Binomial, ClusteredRatio, Missing, PairedBinary
from quantgate.measurements_file import MeasurementSet, read_measurements
from quantgate.plan import ReleaseRequest, make_plan
from quantgate.policy import load_policy
from quantgate.progress import Silent
from quantgate.quality.golden import load_golden_set
from quantgate.quality.results import metrics_of
from quantgate.release import ReleaseResult, build_variants, run_release
from quantgate.report.divergence import divergence_table
from quantgate.variants.source import demo_folder
from quantgate.verdict import Outcome, Verdict

# Lengths are judged by cluster, and the first 48 orders have enough of them.
SETS = {"order-route": 160, "order-lookup": 64, "order-extract": 48}
POLICY = """
policy: tiny.cpu
model: order-desk
device: cpu
variants:
  bf16: {scheme: bf16}
BROKEN
golden_sets: [order-route, order-lookup, order-extract]
serving: {max_batch_size: 16, max_batched_tokens: 512, kv_tokens: 16384, threads: 1}
gates:
  - {id: route, metric: quality/order-route.exact_match, test: non_inferiority, margin: 10 pt,
     sequential: true}
  - {id: typo, metric: quality/order-route.tag-noise-typo.exact_match, test: non_inferiority,
     margin: 50 pt}
  - {id: long, metric: quality/order-lookup.tag-length-long.exact_match, test: non_inferiority,
     margin: 70 pt}
  - {id: finished, metric: validity/order-lookup.finished, test: rate, max: 20 %}
  - {id: long-finished, metric: validity/order-lookup.tag-length-long.finished, test: rate,
     max: 60 %}
  - {id: longer, metric: validity/order-extract.output_tokens.ratio, test: mean, max: 1.1 x}
  - {id: shorter, metric: validity/order-extract.output_tokens.ratio, test: mean, min: 0.9 x}
"""


def write_policy(root: Path, text: str) -> ReleaseRequest:
    path = root / "gates" / "policies" / "tiny.cpu.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return ReleaseRequest(
        policy=load_policy(path), runs=root / "runs", serving_config=root / "serving.yaml"
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, add_mini_set: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    shutil.copytree(demo_folder(), root / "order-desk")
    for name, num_items in SETS.items():
        add_mini_set(name, root / "golden_sets", model=root / "order-desk", num_items=num_items)
    return root


@pytest.fixture(scope="module")
def release(project: Path) -> ReleaseResult:
    """A release of the cast model and of a copy whose last norm is turned around."""
    request = write_policy(project, POLICY.replace("BROKEN", ""))
    sound = build_variants(request, Silent())["bf16"]
    shutil.copytree(sound.folder, project / "broken")
    (project / "broken" / "variant.json").unlink()
    weights = project / "broken" / "model.safetensors"
    tensors = load_file(weights)
    norm = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = torch.flip(norm, dims=(0,)) * -1
    save_file(tensors, weights, metadata={"format": "pt"})
    broken = "  broken: {scheme: bf16, path: broken}"
    return run_release(write_policy(project, POLICY.replace("BROKEN", broken)), Silent())


@pytest.fixture(scope="module")
def measured(release: ReleaseResult) -> MeasurementSet:
    return read_measurements(release.folder.measurements)


def verdicts_of(release: ReleaseResult, variant: str) -> dict[str, Verdict]:
    decision = release.verdicts.decision(variant)
    assert decision is not None
    return {verdict.gate_id: verdict for verdict in decision.verdicts}


def test_the_sound_variant_passes_every_gate_and_is_asked_everything(
    release: ReleaseResult,
) -> None:
    found = verdicts_of(release, "bf16")
    assert {v.gate_id: v.outcome for v in found.values()} == dict.fromkeys(found, Outcome.PASS)
    assert found["route"].n == SETS["order-route"]


def test_the_broken_variant_is_stopped_early_and_the_rest_of_that_set_is_not_judged(
    release: ReleaseResult,
) -> None:
    found = verdicts_of(release, "broken")
    assert (found["route"].outcome, found["route"].n) == (Outcome.FAIL, 64)
    assert "stopped early at 64 of 160 items, which saved about" in found["route"].line()
    assert found["typo"].outcome is Outcome.INVALID
    assert "nothing else is judged on a part" in found["typo"].reason
    # No sequential gate is about the other set, so it was asked to its end.
    assert found["long"].outcome is not Outcome.INVALID


def test_every_metric_of_a_set_is_measured_also_for_the_items_with_a_tag(
    project: Path, measured: MeasurementSet
) -> None:
    golden = load_golden_set(project / "golden_sets" / "order-lookup")
    found = measured.variants["bf16"].measurements
    assert set(metrics_of(golden)) <= found.keys()
    num_long = golden.tag_counts()["length:long"]
    long = found["quality/order-lookup.tag-length-long.exact_match"]
    assert isinstance(long, PairedBinary)
    assert long.n == num_long
    assert isinstance(found["validity/order-lookup.tag-length-long.finished"], Binomial)
    assert isinstance(found["validity/order-extract.output_tokens.ratio"], ClusteredRatio)


def test_where_greedy_answers_part_is_measured_and_shown(measured: MeasurementSet) -> None:
    for variant in ("bf16", "broken"):
        same = measured.variants[variant].measurements["divergence/order-lookup.same_answer.rate"]
        assert isinstance(same, Binomial)
        assert (same.events / same.trials > 0.5) is (variant == "bf16")
    # Choices are compared by log-probabilities, and nothing is generated.
    assert "divergence/order-route.same_answer.rate" not in measured.variants["bf16"].measurements
    assert divergence_table(measured) is not None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tag-length-long.exact", "tag-lenght-long.exact", "yield quality/order-lookup.tag-lenght"),
        ("tag-length-long.finished", "tag-length-long.eos", "expected one of quality/order-lookup"),
        ("order-route.exact_match", "order-route.f1", "does not yield quality/order-route.f1"),
    ],
)
def test_a_gate_on_what_its_set_does_not_yield_is_refused_before_anything_is_measured(
    project: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = POLICY.replace("BROKEN", "")
    assert old in text
    for name in ("order-desk", "golden_sets"):
        (tmp_path / name).symlink_to(project / name)
    with pytest.raises(UsageError, match=r"tiny\.cpu\.yaml:\d+: ") as caught:
        make_plan(write_policy(tmp_path, text.replace(old, new)))
    assert message in str(caught.value)


def test_sequential_is_refused_for_scores_that_are_not_0_or_1(
    tmp_path: Path, project: Path, add_mini_set: Callable[..., Path]
) -> None:
    (tmp_path / "order-desk").symlink_to(project / "order-desk")
    add_mini_set("order-extract", tmp_path / "golden_sets", model=demo_folder(), num_items=4)
    gate = (
        "  - {id: fields, metric: quality/order-extract.json_fields, test: non_inferiority, "
        "margin: 2 pt, sequential: true}"
    )
    text = POLICY.replace("BROKEN", "").split("golden_sets:")[0]
    text += f"golden_sets: [order-extract]\ngates:\n{gate}\n"
    with pytest.raises(UsageError, match=r"scores of 0 and 1 .*, and json_fields is none"):
        make_plan(write_policy(tmp_path, text))


def test_a_missing_part_of_a_set_is_never_a_number(measured: MeasurementSet) -> None:
    stopped = [
        m
        for metric, m in measured.variants["broken"].measurements.items()
        if "/order-route" in metric and metric != "quality/order-route.exact_match"
    ]
    assert stopped
    assert all(isinstance(m, Missing) for m in stopped)
