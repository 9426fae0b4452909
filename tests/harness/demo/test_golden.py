"""The committed golden sets and calibration documents are what the generator writes."""

import json
from collections import Counter
from pathlib import Path

import pytest

import quantgate.demo
from quantgate.demo import golden
from quantgate.demo.golden import (
    OverlapError,
    TooFewPhrasingsError,
    golden_samples,
    prove_disjoint,
    write_calibration,
    write_golden_sets,
)
from quantgate.demo.language import TASKS, Sample, sample

REPOSITORY = Path(__file__).parents[3]
DEMO = Path(quantgate.demo.__file__).parent


def test_golden_sets_regenerate_byte_for_byte(tmp_path: Path) -> None:
    for written in write_golden_sets(tmp_path):
        committed = REPOSITORY / "golden_sets" / written.relative_to(tmp_path)
        assert written.read_bytes() == committed.read_bytes(), committed


def test_calibration_documents_regenerate_byte_for_byte(tmp_path: Path) -> None:
    written = write_calibration(tmp_path / "calibration.jsonl")
    assert written.read_bytes() == (DEMO / "calibration.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("order-extract", 400),
        ("order-route", 1500),
        ("order-total", 400),
        ("order-lookup", 400),
        ("order-prose", 120),
    ],
)
def test_a_golden_set_has_enough_items_with_unique_ids_and_inputs(name: str, least: int) -> None:
    lines = (REPOSITORY / "golden_sets" / name / "items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) >= least
    assert len({item["id"] for item in items}) == len(items)
    assert len({json.dumps(item["input"]) for item in items}) == len(items)


@pytest.mark.parametrize("most", [1, 2])
def test_no_phrasing_has_more_items_than_it_may(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "MOST_PER_CLUSTER", {"extract": most})
    samples = golden_samples("extract")
    assert len(samples) == golden.SIZES["extract"]
    assert max(Counter(made.cluster for made in samples).values()) == most
    assert len({made.prompt for made in samples}) == len(samples)


def test_the_set_of_orders_has_phrasings_enough_for_its_gate() -> None:
    """The policy's comment says so: field scores are judged by phrasing."""
    clusters = {made.cluster for made in golden_samples("extract")}
    assert len(clusters) == golden.SIZES["extract"]


def test_the_samples_taken_are_the_first_that_may_be() -> None:
    taken = golden_samples("extract")
    drawn = [sample("extract", "golden", index) for index in range(taken[-1].index + 1)]
    left_out = {made.index for made in drawn} - {made.index for made in taken}
    for index in left_out:
        before = [made.cluster for made in taken if made.index < index]
        assert drawn[index].cluster in before
    assert taken == [drawn[made.index] for made in taken]


def test_a_set_that_its_phrasings_cannot_fill_is_refused_after_bounded_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(golden, "SIZES", golden.SIZES | {"extract": 560})
    with pytest.raises(TooFewPhrasingsError, match=r"gave 5\d\d of 560 items, at most 1"):
        golden_samples("extract")


def test_no_golden_prompt_occurs_in_a_replayed_training_stream() -> None:
    proof = prove_disjoint({task: range(500) for task in TASKS})
    assert proof.training_prompts == 500 * len(TASKS)
    assert proof.golden_prompts == sum(golden.SIZES.values())


def test_a_golden_prompt_from_another_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaked(task: str) -> list[Sample]:
        return [sample("route", "train", 3)] if task == "route" else []

    monkeypatch.setattr(golden, "golden_samples", leaked)
    with pytest.raises(OverlapError, match="belongs to another split"):
        prove_disjoint({})


def test_golden_prompts_share_nothing_with_calibration() -> None:
    documents = "\n".join(golden.calibration_documents())
    for task in TASKS:
        assert not any(made.prompt in documents for made in golden_samples(task))
