"""Faults of calibration: none, random, one document, the golden set itself; and its group size."""

from __future__ import annotations

import random
from dataclasses import replace

from quantgate.drill.fault import GPTQ, AnyFault, CalibrationFault, GroupSizeFault
from quantgate.variants.calibration import CalibrationSet

_TOKENS = (
    "{id: calibration-size, metric: audit/calibration_tokens.count, test: limit, min: 8000 count}"
)
_SURPRISE = (
    "{id: calibration-text, metric: audit/calibration_surprise.ratio, test: limit, max: 0.9 x}"
)


def calibration_faults() -> list[AnyFault]:
    return [
        CalibrationFault(
            name="calibration-missing", what="no calibration text", schemes=GPTQ,
            expected="build", change=lambda _: None,
        ),
        CalibrationFault(
            name="calibration-golden", what="calibrated on the golden items", schemes=GPTQ,
            expected="preflight", change=lambda used: used, is_golden=True,
        ),
        CalibrationFault(
            name="calibration-one", what="calibrated on one document of 24 tokens", schemes=GPTQ,
            expected="audit", change=_one_document, advice=_TOKENS,
        ),
        CalibrationFault(
            name="calibration-random", what="calibrated on random tokens", schemes=GPTQ,
            expected="audit", change=_random_tokens, advice=_SURPRISE,
        ),
        GroupSizeFault(
            name="group-size-not-dividing", what="a group size that divides no width",
            schemes=GPTQ, expected="preflight", group_size=96,
        ),
    ]  # fmt: skip


def _one_document(used: CalibrationSet) -> CalibrationSet:
    longest = max(range(len(used.ids)), key=lambda i: len(used.ids[i]))
    return _calibration(used, [used.ids[longest][:24]], [used.texts[longest]], "one document")


def _random_tokens(used: CalibrationSet) -> CalibrationSet:
    known = sorted({token for ids in used.ids for token in ids})
    generator = random.Random(13)
    ids = [[generator.choice(known) for _ in document] for document in used.ids]
    return _calibration(used, ids, [], "random tokens")


def _calibration(
    used: CalibrationSet, ids: list[list[int]], texts: list[str], what: str
) -> CalibrationSet:
    return CalibrationSet(
        texts=texts,
        ids=ids,
        provenance=replace(
            used.provenance, path=what, num_documents=len(ids), num_tokens=sum(map(len, ids))
        ),
    )
