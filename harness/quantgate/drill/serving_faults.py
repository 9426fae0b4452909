"""Faults in the process that serves a sound artifact; planted/sitecustomize.py plants them."""

from __future__ import annotations

from quantgate.drill.fault import EVERY, ServingFault

_KL = "{id: kl, metric: quality/kl_nats.mean, test: mean, max: …}"
_FINITE = "{id: finite, metric: quality/non_finite.count, test: limit, max: 0 count}"


def serving_faults() -> list[ServingFault]:
    return [
        ServingFault(
            name="kv-scale", what="keys and values kept in 8 bits at the default scale of 1",
            schemes=EVERY, expected="distribution", planted="kv-scale", advice=_KL,
        ),
        ServingFault(
            name="rope-bf16", what="rotary phases computed in BF16", schemes=EVERY,
            expected="distribution", planted="rope-bf16", advice=_KL,
            why_invisible="below a few hundred positions BF16 phases change less than rounding to "
            "8 or 4 bits does; look for it in the bf16 variant and in long documents",
        ),
        ServingFault(
            name="nan-beyond", what="not a number in one MLP beyond position 40", schemes=EVERY,
            expected="distribution", planted="nan-beyond", advice=_FINITE,
        ),
        ServingFault(
            name="padding-as-positions", what="padding on the left counted as positions",
            schemes=EVERY, expected="distribution", planted="positions-padded", advice=_KL,
        ),
    ]  # fmt: skip
