"""Policies: what loads, what cannot be carried out, and which gates a variant must pass."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantgate.policy import load_policy, required_gates
from quantgate.units import Quantity

if TYPE_CHECKING:
    from conftest import SmallPolicy


def test_a_good_policy_loads_with_its_digest_and_its_lines(small_policy: SmallPolicy) -> None:
    policy = small_policy.load()
    assert policy.path == small_policy.path
    assert policy.sha256 == hashlib.sha256(small_policy.text.encode()).hexdigest()
    assert policy.gate_line("kl") == 18
    assert policy.golden_set_names == ("orders",)
    assert policy.workload is not None
    assert policy.workload.rate == Quantity(20.0, "req/s")
    assert policy.workload.prompt_tokens == (32, 256)


def test_a_short_context_is_enough_where_no_load_is_sent(small_policy: SmallPolicy) -> None:
    start, end = small_policy.text.index("workload:"), small_policy.text.index("gates:")
    text = small_policy.text[:start] + "serving: {max_context: 512}\n" + small_policy.text[end:]
    speed = ("speed", "0.99}", "oom")
    lines = [line for line in text.splitlines() if not any(word in line for word in speed)]
    policy = small_policy.load("\n".join(lines))
    assert (policy.workload, policy.serving.max_context) == (None, 512)


def test_a_gate_without_a_confidence_takes_the_policys(small_policy: SmallPolicy) -> None:
    policy = small_policy.load("confidence: 0.9\n" + small_policy.text)
    assert [gate.confidence for gate in policy.gates] == [0.9, 0.9, 0.99, 0.9]


def test_required_gates_follow_the_filters_in_the_order_written(small_policy: SmallPolicy) -> None:
    policy = small_policy.load()
    assert [gate.id for gate in required_gates(policy, "bf16")] == ["orders", "oom"]
    assert [gate.id for gate in required_gates(policy, "int4")] == ["orders", "kl", "speed", "oom"]


def test_an_unknown_variant_requires_nothing_it_is_an_error(small_policy: SmallPolicy) -> None:
    with pytest.raises(KeyError):
        required_gates(small_policy.load(), "int3")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "model: demo",
            "model: demo\nchampion: bf6",
            'small.yaml:3: unknown champion "bf6"; expected one of bf16, int4; did you mean',
        ),
        (
            "model: demo",
            "model: demo\nreference: fp32",
            'small.yaml:3: unknown reference "fp32"; expected one of source, bf16, int4',
        ),
        (
            "model: demo",
            "model: demo\nserving: {max_context: 319}",
            "a request may have 320 tokens, beyond serving.max_context 319; "
            "write: max_context: 320, or shorter ones",
        ),
        (
            "model: demo",
            "model: demo\nserving: {max_context: 511}",
            "max_tokens is 512, beyond serving.max_context; write: max_tokens: 511",
        ),
        (
            "bf16: {scheme: bf16}",
            "bf16: {scheme: bf16}\n  source: {scheme: bf16}",
            'small.yaml:5: "source" is the name of the source model',
        ),
        (
            "bf16: {scheme: bf16}",
            "bf16: {scheme: bf16}\n  champion: {scheme: bf16}",
            'small.yaml:5: "champion" is the name of the champion\'s arm',
        ),
        (
            "calibration: {path: text}\n",
            "",
            'small.yaml:5: int4-gptq needs "calibration"; write: calibration: {path: FOLDER}',
        ),
        (
            "golden_sets: [golden_sets/orders]",
            "golden_sets: [a/orders, b/orders]",
            'small.yaml:7: golden set "orders" is listed twice',
        ),
        (
            "golden_sets: [golden_sets/orders]",
            "golden_sets: [golden_sets/orders, golden_sets/my faq]",
            'small.yaml:7: golden set "my faq": metrics are named for it, so its name is letters, '
            "digits, - and _; rename it",
        ),
        (
            "golden_sets: [golden_sets/orders]",
            "golden_sets: [golden_sets/orders, perplexity]",
            'small.yaml:7: golden set "perplexity": is what metrics of the distribution are named ',
        ),
        (
            "golden_sets: [golden_sets/orders]",
            "golden_sets: [order]",
            'unknown golden set "orders"; expected one of order; did you mean "order"?',
        ),
        (
            "golden_sets: [golden_sets/orders]",
            "",
            'unknown golden set "orders"; none is listed',
        ),
        (
            "distribution: {golden_set: prose}\n",
            "",
            'small.yaml:17: quality/kl_nats.mean needs "distribution"',
        ),
        (
            "requests: 40",
            "blocks: 3\n  requests: 40",
            "compared over blocks and workload.blocks is 3; write: blocks: 4 or more",
        ),
        ("id: kl,", "id: orders,", 'small.yaml:18: gate id "orders" is already used; rename one'),
        (
            "variants: [int4]",
            "variants: [int8]",
            'small.yaml:20: unknown variant "int8"; expected one of bf16, int4',
        ),
        (
            "schemes: [int4-gptq]",
            "schemes: [int8-bnb]",
            'small.yaml:18: gate "kl" applies to no variant; widen or remove it',
        ),
    ],
)
def test_a_policy_that_cannot_be_carried_out_is_refused_with_its_line(
    small_policy: SmallPolicy, old: str, new: str, expected: str
) -> None:
    assert expected in small_policy.refusal(small_policy.replaced(old, new))


def test_speed_without_a_workload_is_refused(small_policy: SmallPolicy) -> None:
    text = re.sub(r"workload:\n(  .*\n)+", "", small_policy.text)
    assert 'perf/output_tok_per_s.ratio needs "workload"' in small_policy.refusal(text)


def test_a_variant_without_a_gate_is_refused_because_absence_never_passes(
    small_policy: SmallPolicy,
) -> None:
    text = "".join(
        line
        for line in small_policy.text.splitlines(keepends=True)
        if "orders," not in line and "oom" not in line
    )
    refusal = small_policy.refusal(text)
    assert 'no gate applies to variant "bf16", and absence never passes' in refusal


def test_the_policy_of_the_demo_loads() -> None:
    path = Path(__file__).parents[2] / "gates" / "policies" / "demo.cpu.yaml"
    policy = load_policy(path)
    assert set(policy.variants) == {"bf16", "int8-bnb", "int4-nf4", "int4-gptq"}
    assert all(len(required_gates(policy, variant)) >= 15 for variant in policy.variants)
