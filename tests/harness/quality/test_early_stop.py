"""Asking ends early for a broken variant only, and a part is never judged as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.gate import Gate
from quantgate.measure import Missing, PairedBinary
from quantgate.quality.early_stop import StopRule, looks, random_order, stop_rules
from quantgate.quality.golden import GoldenSet, load_golden_set
from quantgate.quality.lock import write_lock
from quantgate.quality.rendering import Renderer
from quantgate.quality.results import count_errors, read_stop, reduce_golden_set
from quantgate.quality.stage import QualityResult, ServedModel, measure_quality
from quantgate.server import ServerOptions
from quantgate.verdict import Outcome, judge

NUM_ITEMS = 300
METRIC = "quality/small.exact_match"
SEQUENTIAL = {"id": "small", "metric": METRIC, "test": "non_inferiority", "sequential": True}
Model = Callable[[int], str]


def gate(margin: str = "5 pt", **changes: Any) -> Gate:
    return Gate.model_validate(SEQUENTIAL | {"margin": margin} | changes)


def right(number: int) -> str:
    return str(number)


def wrong(number: int) -> str:
    return "no"


def wrong_on(share: float) -> Model:
    return lambda number: "no" if number % 100 < 100 * share else str(number)


@pytest.fixture(scope="module")
def folder(make_tokenizer: Callable[..., Path]) -> Path:
    return make_tokenizer()


@pytest.fixture
def golden(write_set: Callable[..., Path], text_task: dict[str, Any], folder: Path) -> GoldenSet:
    lines = [
        {
            "id": f"i{n}",
            "input": f"q{n}",
            "target": str(n),
            "tags": ["even"] if n % 2 == 0 else [],
        }
        for n in range(NUM_ITEMS)
    ]
    checked = text_task | {"validity": [{"type": "finished"}]}
    found = load_golden_set(write_set(*lines, task=checked))
    renderer = Renderer(folder)
    write_lock(found, renderer.describe(found, renderer.render(found)), model="tiny")
    return found


class Desk:
    """Measures models that answer by a function of the item's number, and counts what was asked."""

    def __init__(self, golden: GoldenSet, folder: Path, store: Path, serve: Any) -> None:
        self.golden, self.folder, self.store, self._serve = golden, folder, store, serve
        self._numbers = {p.ids: n for n, p in enumerate(Renderer(folder).render(golden))}
        self.num_asked = 0
        self.num_told = 0

    def measure(
        self,
        model: Model,
        rules: dict[str, StopRule] | None = None,
        *,
        name: str = "v",
        artifact: str = "a",
        options: ServerOptions | None = None,
    ) -> QualityResult:
        async def complete(body: dict[str, Any]) -> tuple[int, Any]:
            numbers = [self._numbers[tuple(ids)] for ids in body["prompt"]]
            self.num_asked += len(numbers)
            choices = [
                {
                    "index": index,
                    "text": model(number),
                    "finish_reason": "stop",
                    "stop_reason": None,
                    "token_ids": [1, number],
                }
                for index, number in enumerate(numbers)
            ]
            return 200, {"choices": choices}

        def tell(count: int) -> None:
            self.num_told += count

        with self._serve(complete) as url:
            return measure_quality(
                ServedModel(name=name, folder=self.folder, artifact_sha256=artifact),
                [self.golden],
                store=self.store,
                log=self.store / f"{name}.log",
                servers=Pool(url, options or ServerOptions()),  # type: ignore[arg-type]
                timeout_s=10,
                on_answers=tell,
                stop_rules=rules,
            )

    def rules(self, *gates: Gate) -> dict[str, StopRule]:
        reference = self.measure(right, name="source", artifact="r")
        self.num_asked = self.num_told = 0
        return stop_rules(gates, reference.items)


class Pool:
    """One server, which somebody else started."""

    def __init__(self, url: str, options: ServerOptions) -> None:
        self.url, self.options = url, options

    @contextmanager
    def serving(self, folder: Path, *, log: Path) -> Iterator[Any]:
        yield SimpleNamespace(url=self.url, oom_count=lambda: 0, peak_bytes=lambda: 1)


@pytest.fixture
def desk(golden: GoldenSet, folder: Path, tmp_path: Path, serve: Any) -> Desk:
    store = tmp_path / "store"
    store.mkdir()
    return Desk(golden, folder, store, serve)


def test_a_broken_variant_is_asked_no_further_than_shows_it(desk: Desk) -> None:
    result = desk.measure(wrong, desk.rules(gate()))
    assert desk.num_asked == 64
    assert desk.num_told == NUM_ITEMS
    stop = result.stopped["small"]
    assert (stop.num_asked, stop.num_items, stop.metrics) == (64, NUM_ITEMS, (METRIC,))
    assert stop.seconds_saved > 0


@pytest.mark.parametrize(
    ("model", "margin"),
    [
        (right, "5 pt"),
        # It would pass at the first look: that is no reason to leave the other gates without items.
        (right, "40 pt"),
        # A drop at the margin, and one so little beyond it that 300 items do not show it.
        (wrong_on(0.05), "5 pt"),
        (wrong_on(0.08), "5 pt"),
    ],
)
def test_a_variant_that_has_not_failed_beyond_doubt_is_asked_everything(
    desk: Desk, model: Model, margin: str
) -> None:
    result = desk.measure(model, desk.rules(gate(margin)))
    assert desk.num_asked == NUM_ITEMS
    assert result.stopped == {}
    assert count_errors(result.items["small"]) == (0, NUM_ITEMS)


def test_every_sequential_gate_on_the_set_must_have_failed(desk: Desk) -> None:
    half = wrong_on(0.5)
    assert desk.measure(half, desk.rules(gate(), gate("99 pt", id="loose"))).stopped == {}
    # Odd items are all right, so the slice of even ones fails and the others do not.
    even = gate(metric="quality/small.tag-even.exact_match", id="even")
    broken = desk.measure(
        lambda n: "no" if n % 2 == 0 else str(n), desk.rules(gate(), even), artifact="b"
    )
    assert set(broken.stopped["small"].metrics) == {METRIC, even.metric}


def test_the_verdict_says_at_which_n_and_nothing_else_about_the_set_is_judged(desk: Desk) -> None:
    rules = desk.rules(gate())
    candidate = desk.measure(wrong, rules).items["small"]
    found = {
        m.metric: m
        for m in reduce_golden_set(desk.golden, rules["small"].reference, candidate, source="s")
    }
    verdict = judge(gate(), found[METRIC], variant="v", baseline="source")
    assert (verdict.outcome, verdict.n) == (Outcome.FAIL, 64)
    assert "stopped early at 64 of 300 items, which saved about" in verdict.line()
    others = {metric: m for metric, m in found.items() if metric != METRIC}
    assert "quality/small.tag-even.exact_match" in others
    assert "validity/small.finished" in others
    for measured in others.values():
        assert isinstance(measured, Missing)
        assert "nothing else is judged on a part" in measured.reason


def test_a_gate_that_is_not_sequential_does_not_judge_a_part() -> None:
    # 64 items without a loss: at a fixed number of items this would pass.
    part = PairedBinary(
        metric=METRIC, source="s", both=64, reference_only=0, candidate_only=0, neither=0,
        early_stop="stopped early at 64 of 300 items",
    )  # fmt: skip
    plain = gate(sequential=False)
    verdict = judge(plain, part, variant="v", baseline="source")
    assert verdict.outcome is Outcome.INVALID
    assert "only a sequential gate judges" in verdict.reason


def test_a_part_is_found_again_by_the_same_rule_and_by_no_other(desk: Desk) -> None:
    rules = desk.rules(gate())
    first = desk.measure(wrong, rules)
    again = desk.measure(wrong, rules, name="renamed")
    assert (desk.num_asked, again.items, again.num_reused) == (64, first.items, 1)
    looser = desk.measure(wrong, desk.rules(gate("10 pt")))
    assert desk.num_asked == 64
    assert looser.items != first.items
    # Whoever needs all items gets all, and from then on so does whoever would have stopped.
    everything = desk.measure(wrong)
    assert desk.num_asked == 64 + NUM_ITEMS
    assert read_stop(everything.items["small"]) is None
    assert desk.measure(wrong, rules).stopped == {}
    assert desk.num_asked == 64 + NUM_ITEMS


def test_a_set_that_no_sequential_gate_is_about_has_no_rule(desk: Desk) -> None:
    assert stop_rules([gate(sequential=False)], {"small": desk.store}) == {}
    assert stop_rules([gate(metric="quality/other.exact_match")], {"small": desk.store}) == {}


def test_the_order_is_fixed_and_that_of_nobody(golden: GoldenSet) -> None:
    order = random_order(golden)
    assert order == random_order(golden)
    assert sorted(order) == list(range(NUM_ITEMS))
    # A part of a sorted file would be one end of it.
    assert 0.25 < sum(position < NUM_ITEMS / 2 for position in order[:64]) / 64 < 0.75


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 20_000))
def test_looks_grow_to_the_whole_set(num_items: int) -> None:
    found: Sequence[int] = list(looks(num_items))
    assert found[-1] == num_items
    assert all(0 < b - a <= max(a, 64) for a, b in zip([0, *found], found, strict=False))
