"""Asking a broken variant no further: when every sequential gate on a set has failed beyond doubt.

Only a sequential gate may be looked at while items are asked, and only its whole interval beyond
the margin ends the asking: a variant whose drop is within the margin is stopped with probability
1 - confidence at most, over all looks together. Nothing stops for a PASS, since the set's other
gates still need its items.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq

from quantgate.files import sha256_of_bytes, sha256_of_json
from quantgate.finding import Finding, find
from quantgate.gate import Gate
from quantgate.measure import Measurement, Missing
from quantgate.quality.answers import Answer
from quantgate.quality.golden import GoldenSet
from quantgate.quality.results import EarlyStop, measure_part
from quantgate.quality.rows import tabulate
from quantgate.units import parse_metric

_FIRST_LOOK = 64
"""As many as are asked together; a look waits for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """The sequential gates on one set, and the reference's complete results to compare with."""

    gates: tuple[Gate, ...]
    reference: Path

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(gate.metric for gate in self.gates))

    @property
    def sha256(self) -> str:
        """Of all that decides where a set is stopped."""
        return sha256_of_json(
            {
                "reference": sha256_of_bytes(self.reference.read_bytes()),
                "first_look": _FIRST_LOOK,
                "gates": [
                    [gate.metric, gate.limit.to("1"), gate.confidence, gate.min_n]
                    for gate in self.gates
                ],
            }
        )

    def has_failed(self, part: GoldenSet, answers: Sequence[Answer]) -> bool:
        """Whether nothing that is still to be asked can matter to any of the gates."""
        found = measure_part(
            part, pq.read_table(self.reference), tabulate(part, answers), self.metrics
        )
        return all(_is_beyond_doubt(gate, found.get(gate.metric)) for gate in self.gates)


def stop_rules(gates: Iterable[Gate], reference: Mapping[str, Path]) -> dict[str, StopRule]:
    """The rules that sequential gates make, by golden set, of those the reference has answered."""
    by_set: dict[str, list[Gate]] = {}
    for gate in gates:
        if gate.sequential:
            by_set.setdefault(parse_metric(gate.metric).stem, []).append(gate)
    return {
        name: StopRule(gates=tuple(found), reference=reference[name])
        for name, found in by_set.items()
        if name in reference
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The items that were asked, in the set's order, with their answers; a part if stopped."""

    part: GoldenSet
    answers: Sequence[Answer]
    stop: EarlyStop | None = None


def ask_until_failed(
    golden: GoldenSet, rule: StopRule, ask: Callable[[Sequence[int]], Sequence[Answer]]
) -> Asked:
    """Asks items in a fixed random order, and looks now and then whether the rule has failed.

    Args:
        ask: answers the items at these positions, in their order.
    """
    order = random_order(golden)
    answers: dict[int, Answer] = {}
    started = time.perf_counter()
    for end in looks(len(order)):
        positions = order[len(answers) : end]
        answers.update(zip(positions, ask(positions), strict=True))
        seconds_per_item = (time.perf_counter() - started) / end
        asked = sorted(answers)
        part = replace(golden, items=tuple(golden.items[at] for at in asked))
        in_order = [answers[at] for at in asked]
        num_left = len(order) - end
        if num_left and rule.has_failed(part, in_order):
            stop = EarlyStop(
                num_asked=end,
                num_items=len(order),
                metrics=rule.metrics,
                seconds_saved=seconds_per_item * num_left,
            )
            return Asked(part=part, answers=in_order, stop=stop)
    return Asked(part=golden, answers=in_order)


def random_order(golden: GoldenSet) -> list[int]:
    """Positions of the items in an order that nobody chose: by digests of the set and the id.

    Files are often sorted by topic or length, and a part from their start is no sample.
    """
    seed = golden.items_sha256
    digests = [sha256_of_bytes(f"{seed}/{item.id}".encode()) for item in golden.items]
    return sorted(range(len(digests)), key=digests.__getitem__)


def looks(num_items: int) -> Iterator[int]:
    """Numbers of items after which to look, the last one all: each twice the one before.

    A set of 10,000 items is held up eight times, and a variant that is broken is asked at most
    twice the items that show it.
    """
    end = _FIRST_LOOK
    while end < num_items:
        yield end
        end *= 2
    yield num_items


def _is_beyond_doubt(gate: Gate, measured: Measurement | None) -> bool:
    if measured is None or isinstance(measured, Missing):
        return False
    found = find(gate, measured)
    return isinstance(found, Finding) and found.interval.upper < found.limit
