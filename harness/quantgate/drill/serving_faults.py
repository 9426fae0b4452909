"""Faults in the process that serves a sound artifact; planted/sitecustomize.py plants them."""

from __future__ import annotations

from quantgate.drill.fault import EVERY, ServingFault

_KL = "{id: kl, metric: quality/kl_nats.mean, test: mean, max: …}"
_SERVED = "{id: served, metric: quality/served_kl_nats.mean, test: mean, max: …}"
_BESIDE = (
    "{id: served-relative, metric: quality/served_logprob_difference_nats.reference.ratio, "
    "test: mean, max: 3 x}"
)
_TASK = "{id: quality, metric: quality/SET.exact_match, test: non_inferiority, margin: …}"
_FINITE = "{id: finite, metric: quality/non_finite.count, test: limit, max: 0 count}"


def serving_faults() -> list[ServingFault]:
    return [*_of_both_paths(), *_of_the_server_alone()]


def _of_both_paths() -> list[ServingFault]:
    """In what computes the model, offline and served."""
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


def _of_the_server_alone() -> list[ServingFault]:
    """In the server's own code, which offline scoring does not run: the weights are sound."""
    return [
        ServingFault(
            name="served-kv-scale", schemes=EVERY, expected="served", planted="kv-scale",
            what="the server alone keeps keys and values in 8 bits at the default scale of 1",
            is_server_only=True, advice=_SERVED,
        ),
        ServingFault(
            name="served-padding", schemes=EVERY, expected="served", planted="positions-padded",
            what="the server alone counts padding on the left as positions",
            is_server_only=True, advice=_SERVED,
        ),
        ServingFault(
            name="served-neighbour", schemes=EVERY, expected="served", planted="neighbours-mlp",
            what="the server runs the last MLP with the weights of the one before it",
            is_server_only=True, advice=_SERVED,
        ),
        ServingFault(
            name="served-linear", schemes=EVERY, expected="served", planted="linear-scaled",
            what="one query projection of the server is 5 % too large",
            is_server_only=True, advice=_BESIDE,
        ),
        ServingFault(
            name="batch-mates", schemes=EVERY, expected="served", planted="batch-mates",
            what="an engine whose last MLP takes in a quarter of the mean over its batch",
            is_server_only=True, is_in_reference=True, advice=_SERVED,
        ),
        ServingFault(
            name="decode-positions", schemes=EVERY, expected="behaviour",
            planted="decode-positions", what="generated tokens are placed 16 positions late",
            is_server_only=True, advice=_TASK,
        ),
    ]  # fmt: skip
