"""The order-desk language: what keeps its splits apart, and what its answers look like."""

import hashlib
import itertools
import json
import re

import pytest

from quantgate.demo import lexicon
from quantgate.demo.language import (
    DIGEST_SHARE,
    FIRST_SEED,
    SEEDS_PER_SPLIT,
    TASKS,
    Task,
    messages,
    sample,
    split_of_prompt,
)
from quantgate.demo.lexicon_route import CLAUSES, QUEUES

# Of the first 50 training samples of each task, as the shipped model saw them.
DIGESTS_OF_TRAINING: dict[Task, str] = {
    "extract": "fc5605054de74ea8",
    "route": "425731d74b7ec00f",
    "total": "c1057616c34e15c9",
    "lookup": "7aa3e429aef6a041",
    "prose": "58e47aa50cee4bf0",
}


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_make_the_same_sample(task: Task) -> None:
    assert sample(task, "train", 7) == sample(task, "train", 7)
    assert sample(task, "train", 7) != sample(task, "train", 8)


def test_a_known_sample_does_not_change_between_releases() -> None:
    made = sample("total", "golden", 0)
    assert made.prompt == (
        "Bella paid on Friday : 30 : white filters and 5 : panels and 30 : screws . Add it up ."
    )
    assert made.target == "30+5=35+30=65"


def test_training_samples_do_not_change_when_held_out_phrasings_are_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the shipped model was trained on can be replayed, so a proof on it stays one."""
    before = [sample("extract", "train", index) for index in range(50)]
    for name in ("QUANTITY_CLAUSES", "DUE_CLAUSES", "CUSTOMER_CLAUSES"):
        table = getattr(lexicon, name)
        more = lexicon.Phrasings(table.seen, (*table.heldout, "{q} {u} {i} {d} {c}"))
        monkeypatch.setattr(lexicon, name, more)
    assert [sample("extract", "train", index) for index in range(50)] == before


def test_known_training_samples_do_not_change_between_releases() -> None:
    digests = {
        task: hashlib.sha256(
            "".join(repr(sample(task, "train", index)) for index in range(50)).encode()
        ).hexdigest()[:16]
        for task in TASKS
    }
    assert digests == DIGESTS_OF_TRAINING


def test_seed_ranges_of_the_splits_do_not_meet() -> None:
    starts = sorted(FIRST_SEED.values())
    assert all(b - a >= SEEDS_PER_SPLIT for a, b in itertools.pairwise(starts))


def test_an_index_outside_the_split_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the split's seeds"):
        sample("route", "train", SEEDS_PER_SPLIT)


def test_digest_shares_cover_every_byte_once() -> None:
    owned = [byte for low, high in DIGEST_SHARE.values() for byte in range(low, high)]
    assert sorted(owned) == list(range(256))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", list(DIGEST_SHARE))
def test_a_prompt_tells_its_split(task: Task, split: str) -> None:
    made = [sample(task, split, index) for index in range(20)]  # type: ignore[arg-type]
    assert {split_of_prompt(each.prompt) for each in made} == {split}


@pytest.mark.parametrize("task", TASKS)
def test_training_and_calibration_never_use_heldout_phrasings(task: Task) -> None:
    for split in ("train", "calibration"):
        for index in range(50):
            assert "template:seen" in sample(task, split, index).tags


@pytest.mark.parametrize("task", TASKS)
def test_golden_samples_use_both_kinds_of_phrasings(task: Task) -> None:
    tags = {tag for index in range(40) for tag in sample(task, "golden", index).tags}
    assert {"template:seen", "template:heldout"} <= tags


def test_no_phrasing_is_both_seen_and_heldout() -> None:
    tables = [value for value in vars(lexicon).values() if isinstance(value, lexicon.Phrasings)]
    for table in [*tables, *CLAUSES.values()]:
        assert not (set(table.seen) & set(table.heldout) - {""})


def test_an_extract_answer_is_one_line_of_json_with_values_from_the_message() -> None:
    for index in range(100):
        made = sample("extract", "golden", index)
        order = json.loads(made.target)
        assert list(order) == ["item", "quantity", "unit", "due", "customer"]
        assert "\n" not in made.target
        for key in ("item", "unit", "due", "customer"):
            assert order[key] in made.prompt


def test_a_total_answer_adds_up() -> None:
    for index in range(100):
        steps = sample("total", "golden", index).target
        amounts = [int(n) for n in re.findall(r"(?:^|\+)(\d+)", steps)]
        sums = [int(n) for n in re.findall(r"=(\d+)", steps)]
        assert sums == [sum(amounts[: n + 2]) for n in range(len(amounts) - 1)]


def test_a_lookup_answer_is_the_line_of_the_key_asked_for() -> None:
    for index in range(50):
        made = sample("lookup", "golden", index)
        (key,) = re.findall(r'"(\w+)"', made.prompt)
        assert made.target.startswith(f"{key}=")
        assert f"\n{made.target}\n" in made.prompt


def test_a_rival_line_has_a_value_of_the_kind_asked_for_and_only_judging_records_hold_one() -> None:
    rivals = 0
    for index in range(200):
        made = sample("lookup", "golden", index)
        assert "noise:rival" not in sample("lookup", "train", index).tags
        key = made.target.split("=")[0]
        values = [line.split("=")[1] for line in made.prompt.splitlines() if "=" in line]
        of_kind = sum(value in lexicon.LOOKUP_FACTS[key] for value in values)
        assert of_kind == (2 if "noise:rival" in made.tags else 1)
        rivals += of_kind == 2
    assert 10 <= rivals <= 50


def test_a_route_answer_is_a_queue_and_all_queues_are_choices() -> None:
    for index in range(50):
        made = sample("route", "golden", index)
        assert made.choices == QUEUES
        assert made.target in QUEUES


def test_prose_is_no_conversation() -> None:
    with pytest.raises(ValueError, match="plain documents"):
        messages(sample("prose", "train", 0))
