"""What pydantic finds wrong, in the words of the file: where, what was expected, what to write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import SmallPolicy


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("policy: small\n", "", 'small.yaml:1: "policy" is missing; write: policy: NAME'),
        (
            "policy: small",
            "policy: a b",
            "small.yaml:1: policy is 'a b': string should match",
        ),
        ("model: demo", "model: 3", "small.yaml:2: model is 3; expected text; write: model: demo"),
        (
            "model: demo",
            "model: demo\nmodle: x",
            'small.yaml:3: unknown key "modle"; expected one of policy, description, model, '
            "device, reference, champion, variants, calibration, golden_sets, distribution, "
            "workload, serving, confidence, gates;",
        ),
        ("model: demo", "model: demo\nmodle: x", 'did you mean "model"?'),
        ("model: demo", "model: demo\ndevice: gpu", "small.yaml:3: device is 'gpu'"),
        (
            "model: demo",
            "model: demo\nconfidence: high",
            "small.yaml:3: confidence is 'high'; expected a number; write: confidence: 0.95",
        ),
        (
            "model: demo",
            "model: demo\nconfidence: 0.4",
            "small.yaml:3: confidence is 0.4: input should be greater than 0.5",
        ),
        (
            "model: demo",
            "model: demo\nserving: {native_kernels: fast}",
            "small.yaml:3: native_kernels is 'fast'; expected true or false",
        ),
        (
            "model: demo",
            "model: demo\nserving: {timeout: [1]}",
            "small.yaml:3: timeout is [1]; expected a quantity",
        ),
        (
            "model: demo",
            "model: demo\nserving: {threads: 1.5}",
            "small.yaml:3: threads is 1.5; expected a whole number",
        ),
        (
            "model: demo",
            "model: demo\nserving: 3",
            "small.yaml:3: serving is 3; expected a mapping",
        ),
        (
            "bf16: {scheme: bf16}",
            "bf16: {scheme: bf61}",
            'int8-bnb, int8-gptq, int4-nf4 or int4-gptq; did you mean "bf16"?',
        ),
        ("bf16: {scheme: bf16}", "bf16: {schema: bf16}", 'small.yaml:4: unknown key "schema"'),
        ("bf16: {scheme: bf16}", "bf16: {scheme: bf16, options: {a: [1]}}", "small.yaml:4: "),
        (
            "golden_sets: [golden_sets/orders]",
            "golden_sets: orders",
            "small.yaml:7: golden_sets is 'orders'; expected a list",
        ),
        (
            "requests: 40",
            "requests: 0",
            "small.yaml:13: requests is 0: input should be greater than or equal to 1; write",
        ),
        ("id: kl, ", "", 'small.yaml:18: "id" is missing; write: id: NAME'),
        (
            "max: 0.06 nats",
            "max: 0.06 ms",
            'max is in "ms", but quality/kl_nats.mean is measured in nats; write: max: 0.06 nats',
        ),
        (
            "max: 0.06 nats",
            "max: 0.06",
            "small.yaml:18: max 0.06 has no unit; expected quality/kl_nats.mean in nats; write",
        ),
        ("test: mean", "test: means", 'small.yaml:18: test is "means"; expected non_inferiority'),
        (
            "metric: quality/kl_nats.mean",
            "metric: qualit/kl_nats.mean",
            'small.yaml:18: unknown metric section "qualit"',
        ),
        (
            "schemes: [int4-gptq]",
            "schemes: [int4]",
            'small.yaml:18: schemes is "int4"; expected bf16',
        ),
    ],
)
def test_a_wrong_key_or_value_is_told_with_its_line_and_what_to_write(
    small_policy: SmallPolicy, old: str, new: str, expected: str
) -> None:
    assert expected in small_policy.refusal(small_policy.replaced(old, new))


def test_a_policy_without_gates_is_refused(small_policy: SmallPolicy) -> None:
    text = small_policy.text[: small_policy.text.index("gates:")] + "gates: []\n"
    assert "small.yaml:16: gates is []: " in small_policy.refusal(text)


def test_every_problem_is_reported_in_the_order_of_lines(small_policy: SmallPolicy) -> None:
    text = small_policy.replaced("20 req/s", "20").replace("{scheme: bf16}", "{scheme: bf61}")
    lines = small_policy.refusal(text).splitlines()
    assert [line.split(":")[1] for line in lines] == ["4", "12"]
