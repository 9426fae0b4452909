"""Drills from end to end: each layer turns on its fault and lets its harmless twin through."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantgate.drill.results import Caught, DrillResult
from quantgate.drill.runner import DrillRequest, run_drill
from quantgate.errors import UsageError
from quantgate.plan import ReleaseRequest
from quantgate.policy import load_policy
from quantgate.progress import Silent

from ..conftest import write_mini_set

if TYPE_CHECKING:
    from conftest import MiniProject

POLICY = """
policy: drilled
model: {model}
device: cpu
champion: bf16
variants: {{bf16: {{scheme: bf16}}}}
serving: {{max_batch_size: 8, max_batched_tokens: 256, kv_tokens: 4096, threads: 1, timeout: 60 s}}
"""
AUDIT = """
gates:
  - {id: weights, metric: audit/weight_error.ratio, test: limit, max: 1.4 x}
"""
SPEED = """
gates:
  - {id: memory, metric: memory/peak_bytes.max, test: limit, max: 2 GiB}
"""
DISTRIBUTION = """
distribution: {golden_set: order-prose, max_tokens: 64}
gates:
  - {id: kl, metric: quality/kl_nats.mean, test: mean, max: 0.001 nats}
  - {id: finite, metric: quality/non_finite.count, test: limit, max: 0 count}
"""
SERVED = """
golden_sets: [order-extract, order-lookup]
distribution: {golden_set: order-prose, max_tokens: 64}
gates:
  - {id: extract, metric: quality/order-extract.exact_match, test: non_inferiority, margin: 30 pt}
  - {id: finished, metric: validity/order-lookup.finished, test: rate, max: 50 %}
  - {id: served, metric: quality/served_kl_nats.mean, test: mean, max: 0.00001 nats}
  - {id: near, metric: quality/served_logprob_difference_nats.reference.ratio, test: mean, max: 3 x}
  - {id: noise-floor, metric: quality/noise_floor_kl_nats.mean, test: mean, max: 0.00001 nats}
"""
BEHAVIOUR = """
golden_sets: [order-lookup]
gates:
  - {id: finished, metric: validity/order-lookup.finished, test: rate, max: 50 %}
"""


def drill(
    root: Path, gates: str, faults: Sequence[str], *, model: str = "demo"
) -> tuple[DrillResult, Path]:
    path = root / "gates" / "policies" / "drilled.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(POLICY.format(model=model) + gates, encoding="utf-8")
    release = ReleaseRequest(
        policy=load_policy(path), runs=root / "runs", serving_config=root / "serving.yaml"
    )
    return run_drill(DrillRequest(release=release, faults=faults), Silent())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo model's variants are built once."""
    return tmp_path_factory.mktemp("demo")


def outcomes(result: DrillResult) -> dict[str, tuple[Caught, str]]:
    return {row.fault: (row.outcome, row.layer) for row in result.rows}


@pytest.fixture(scope="module")
def audited(demo: Path) -> tuple[DrillResult, Path]:
    """Faults of every kind under a policy that has a gate for one of them."""
    faults = (
        "neighbours-weights", "eos-changed", "stale-cache", "nibbles-swapped", "kv-scale",
        "resharded", "same-again", "items-shuffled",
    )  # fmt: skip
    return drill(demo, AUDIT, faults)


@pytest.fixture(scope="module")
def asked_project(mini_project: MiniProject) -> MiniProject:
    """With golden sets whose answers show what is planted."""
    sets, model = mini_project.root / "golden_sets", mini_project.root / "order-desk"
    write_mini_set("order-extract", sets, model=model, num_items=12)
    # Prompts of 48 tokens and more, so that all of them reach the spoiled positions.
    write_mini_set("order-lookup", sets, model=model, num_items=8)
    return mini_project


@pytest.fixture(scope="module")
def distribution(asked_project: MiniProject) -> tuple[DrillResult, Path]:
    faults = ("nan-beyond", "padding-as-positions", "resharded", "fp16-instead")
    return drill(asked_project.root, DISTRIBUTION, faults, model="order-desk")


@dataclass(frozen=True)
class Served:
    """What a drill of the server's layers found, and what it did with stored offline scores."""

    result: DrillResult
    path: Path
    scored_before: Mapping[Path, int]
    scored_after: Mapping[Path, int]
    """When each stored offline score was written, ns."""


@pytest.fixture(scope="module")
def served(asked_project: MiniProject, distribution: tuple[DrillResult, Path]) -> Served:
    """Of faults of the server alone, which offline scoring has not met."""
    store = distribution[1].parents[1] / "store" / "results"
    before = written(store)
    faults = (
        "served-neighbour", "served-linear", "batch-mates", "other-batches", "decode-positions",
    )  # fmt: skip
    result, path = drill(asked_project.root, SERVED, faults, model="order-desk")
    return Served(result, path, scored_before=before, scored_after=written(store))


def written(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.glob("distribution-*.parquet")}


def test_a_blind_spot_is_named_with_the_gate_to_add(audited: tuple[DrillResult, Path]) -> None:
    result, path = audited
    assert outcomes(result) == {
        "neighbours-weights": (Caught.CAUGHT, "audit"),
        "eos-changed": (Caught.LET_THROUGH, ""),
        "stale-cache": (Caught.CAUGHT, "digest"),
        "resharded": (Caught.PASSED, ""),
        "same-again": (Caught.NOT_JUDGED, ""),
        "kv-scale": (Caught.LET_THROUGH, ""),
    }
    assert not result.is_clean
    assert "audit/file_difference.count" in result.advice["eos-changed"]
    assert "nibbles-swapped" in result.not_applicable
    assert json.loads(path.read_text(encoding="utf-8"))["num_caught"] == 2
    assert result.seconds_by_layer.keys() == {"build", "plant", "audit"}
    # Mutants are as large as models: none is left behind.
    assert not (path.parent / "mutants").exists()


def test_what_no_gate_of_the_policy_looks_at_is_not_judged_and_a_fault_there_is_let_through(
    audited: tuple[DrillResult, Path],
) -> None:
    result, _ = audited
    notes = {row.fault: row.note for row in result.rows}
    assert notes["same-again"].startswith("not judged: no gate of the policy looks at served or")
    assert notes["kv-scale"].startswith("not judged: no gate of the policy looks at distribution")
    assert result.not_applicable["items-shuffled.bf16"] == "the policy names no golden set"
    assert (result.exit_code, result.num_benign, result.num_not_judged) == (1, 1, 1)


def test_the_distribution_layer_sees_serving_faults_and_no_harmless_change(
    distribution: tuple[DrillResult, Path],
) -> None:
    result, _ = distribution
    assert outcomes(result) == {
        "nan-beyond": (Caught.CAUGHT, "distribution"),
        "padding-as-positions": (Caught.CAUGHT, "distribution"),
        "resharded": (Caught.PASSED, ""),
        "fp16-instead": (Caught.PASSED, ""),
    }
    assert result.is_clean
    gates = {row.fault: row.gates for row in result.rows}
    # Where logits are not finite there is no KL, which is INVALID and not small.
    assert gates["nan-beyond"] == ("kl", "finite")
    assert gates["padding-as-positions"] == ("kl",)


def test_the_sound_variant_is_not_scored_beside_the_others_only_to_be_forgotten(
    served: Served,
) -> None:
    assert served.scored_before
    assert served.scored_after == served.scored_before
    # The weights are sound, so nothing was scored offline but the sound variant.
    assert not list((served.path.parent / "distribution").glob("*.parquet"))


def test_the_behaviour_layer_sees_a_served_fault_and_no_harmless_change(
    asked_project: MiniProject, served: Served
) -> None:
    faults = ("nan-beyond", "items-shuffled")
    result, _ = drill(asked_project.root, BEHAVIOUR, faults, model="order-desk")
    assert outcomes(result) == {
        "nan-beyond": (Caught.CAUGHT, "behaviour"),
        "items-shuffled": (Caught.PASSED, ""),
    }
    assert result.is_clean
    # The same gate, asked in other batches.
    [row] = [row for row in served.result.rows if row.fault == "other-batches"]
    assert row.outcome is Caught.PASSED


def test_a_policy_of_speed_gates_alone_judges_nothing(demo: Path) -> None:
    faults = ("stale-cache", "neighbours-weights", "resharded", "same-again")
    result, _ = drill(demo, SPEED, faults)
    assert outcomes(result) == {
        "stale-cache": (Caught.CAUGHT, "digest"),
        "neighbours-weights": (Caught.LET_THROUGH, ""),
        "resharded": (Caught.NOT_JUDGED, ""),
        "same-again": (Caught.NOT_JUDGED, ""),
    }
    assert result.exit_code == 1
    # Where every planted fault is refused before a gate, nothing was let through, and yet nothing
    # was shown of the gates.
    result, _ = drill(demo, SPEED, ("stale-cache", "resharded"))
    assert result.exit_code == 3


def test_a_gate_that_does_not_pass_on_the_sound_variant_judges_nothing(demo: Path) -> None:
    gates = AUDIT.replace("1.4 x", "0.1 x")
    result, _ = drill(demo, gates, ("neighbours-weights", "resharded"))
    assert outcomes(result) == {
        "neighbours-weights": (Caught.LET_THROUGH, ""),
        "resharded": (Caught.NOT_JUDGED, ""),
    }
    reason = "not judged: weights do not pass on the sound variant either"
    assert {row.note for row in result.rows} == {reason}


def test_the_served_layer_sees_faults_of_the_server_alone_and_no_other_batch_size(
    served: Served,
) -> None:
    result = served.result
    found = outcomes(result)
    del found["decode-positions"]
    assert found == {
        "served-neighbour": (Caught.CAUGHT, "served"),
        "served-linear": (Caught.CAUGHT, "served"),
        "batch-mates": (Caught.CAUGHT, "served"),
        "other-batches": (Caught.PASSED, ""),
    }
    assert result.is_clean
    gates = {row.fault: row.gates for row in result.rows}
    # Within the absolute limit, and far from how near the reference's server is to offline.
    assert gates["served-linear"] == ("near",)
    # An engine with a fault has it for the reference too, which then differs from itself.
    assert gates["batch-mates"][0] == "served"
    assert "noise-floor" in gates["batch-mates"]
    assert gates["served-neighbour"][:2] == ("served", "near")
    effects = {row.fault: row.effect for row in result.rows}
    assert effects["served-linear"].startswith("served KL ")
    assert effects["served-linear"].endswith(" x sound")


def test_behaviour_sees_what_only_generating_shows(served: Served) -> None:
    assert outcomes(served.result)["decode-positions"] == (Caught.CAUGHT, "behaviour")


def test_an_unknown_fault_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--faults nothing: no such fault"):
        drill(tmp_path, AUDIT, ("nothing",))
    assert not (tmp_path / "runs").exists()
