"""Policies: what loads, what is refused and where, and which gates a variant must pass."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from quantgate.policy import load_policy, required_gates
from quantgate.spec import SpecError
from quantgate.units import Quantity

GOOD = """\
policy: small
model: demo
variants:
  bf16: {scheme: bf16}
  int4: {scheme: int4-gptq, group_size: 128}
calibration: {path: text}
golden_sets: [golden_sets/orders]
distribution: {golden_set: prose}
workload:
  seed: 7
  burst_requests: 32
  rate: 20 req/s
  requests: 40
  prompt_tokens: [32, 256]
  output_tokens: [16, 64]
gates:
  - {id: orders, metric: quality/orders.exact_match, test: non_inferiority, margin: 2 pt}
  - {id: kl, metric: quality/kl_nats.mean, test: mean, max: 0.06 nats, schemes: [int4-gptq]}
  - {id: speed, metric: perf/output_tok_per_s.ratio, test: ratio, min: 0.95 x,
     variants: [int4], confidence: 0.99}
  - {id: oom, metric: stability/oom.count, test: limit, max: 0 count}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def replaced(old: str, new: str) -> str:
    if old not in GOOD:
        raise ValueError(f"{old!r} is not in the good policy")
    return GOOD.replace(old, new, 1)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_policy(written(folder, text))
    return str(caught.value).replace(f"{folder}/", "")


def test_a_good_policy_loads_with_its_digest_and_its_lines(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    policy = load_policy(path)
    assert policy.path == path
    assert policy.sha256 == hashlib.sha256(GOOD.encode()).hexdigest()
    assert policy.gate_line("kl") == 18
    assert policy.golden_set_names == ("orders",)
    assert policy.workload is not None
    assert policy.workload.rate == Quantity(20.0, "req/s")
    assert policy.workload.prompt_tokens == (32, 256)


def test_what_is_not_written_has_the_documented_default(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, GOOD))
    assert (policy.device, policy.reference, policy.champion) == ("auto", "source", "bf16")
    assert policy.serving.timeout == Quantity(60.0, "s")
    assert policy.serving.caches is False


def test_caches_are_on_where_the_policy_says_so(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, "serving: {caches: on}\n" + GOOD))
    assert policy.serving.caches is True
    assert "caches is 64; expected true or false" in refusal(
        tmp_path, "serving: {caches: 64}\n" + GOOD
    )


def test_context_window_and_kernels_are_the_servers_own_unless_they_are_written(
    tmp_path: Path,
) -> None:
    serving = load_policy(written(tmp_path, GOOD)).serving
    assert (serving.max_context, serving.admission_window) == (None, None)
    assert serving.native_kernels is True
    block = "serving: {max_context: 1024, admission_window: 5 ms, native_kernels: off}\n"
    serving = load_policy(written(tmp_path, block + GOOD)).serving
    assert (serving.max_context, serving.admission_window) == (1024, Quantity(5.0, "ms"))
    assert serving.native_kernels is False


def test_a_short_context_is_enough_where_no_load_is_sent(tmp_path: Path) -> None:
    start, end = GOOD.index("workload:"), GOOD.index("gates:")
    text = GOOD[:start] + "serving: {max_context: 512}\n" + GOOD[end:]
    speed = ("speed", "0.99}", "oom")
    lines = [line for line in text.splitlines() if not any(word in line for word in speed)]
    policy = load_policy(written(tmp_path, "\n".join(lines)))
    assert (policy.workload, policy.serving.max_context) == (None, 512)


def test_a_gate_without_a_confidence_takes_the_policys(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, "confidence: 0.9\n" + GOOD))
    assert [gate.confidence for gate in policy.gates] == [0.9, 0.9, 0.99, 0.9]


def test_required_gates_follow_the_filters_in_the_order_written(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, GOOD))
    assert [gate.id for gate in required_gates(policy, "bf16")] == ["orders", "oom"]
    assert [gate.id for gate in required_gates(policy, "int4")] == ["orders", "kl", "speed", "oom"]


def test_an_unknown_variant_requires_nothing_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        required_gates(load_policy(written(tmp_path, GOOD)), "int3")


def test_a_variant_that_is_brought_needs_no_calibration(tmp_path: Path) -> None:
    text = replaced("calibration: {path: text}\n", "").replace(
        "group_size: 128}", "path: elsewhere/gptq}"
    )
    assert not load_policy(written(tmp_path, text)).variants["int4"].is_calibrated


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
            'small.yaml:3: unknown key "modle"; expected one of policy',
        ),
        ("model: demo", "model: demo\nmodle: x", 'did you mean "model"?'),
        ("model: demo", "model: demo\ndevice: gpu", "small.yaml:3: device is 'gpu'"),
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
            "model: demo\nserving: {admission_window: 51 ms}",
            "small.yaml:3: 51 ms is more than 50 ms; write: 50 ms",
        ),
        (
            "model: demo",
            "model: demo\nserving: {native_kernels: fast}",
            "small.yaml:3: native_kernels is 'fast'; expected true or false",
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
            "model: demo",
            "model: demo\nserving: {timeout: 60}",
            "small.yaml:3: 60 has no unit; write: 60 ms",
        ),
        (
            "model: demo",
            "model: demo\nserving: {timeout: 0 s}",
            'small.yaml:3: "0 s" is not more than 0',
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
        (
            "bf16: {scheme: bf16}",
            "bf16: {scheme: bf16, group_size: 64}",
            'small.yaml:4: "group_size" is not for scheme "bf16"; remove it',
        ),
        ("bf16: {scheme: bf16}", "bf16: {scheme: bf16, options: {a: [1]}}", "small.yaml:4: "),
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
            "golden_sets: orders",
            "small.yaml:7: golden_sets is 'orders'; expected a list",
        ),
        (
            "golden_sets: [golden_sets/orders]",
            "golden_sets: [a/orders, b/orders]",
            'small.yaml:7: golden set "orders" is listed twice',
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
        ("rate: 20 req/s", "rate: 20", "small.yaml:12: 20 has no unit; write: 20 req/s"),
        (
            "rate: 20 req/s",
            "rate: 20 tok/s",
            'small.yaml:12: "20 tok/s" is not a request rate; write: 20 req/s',
        ),
        ("rate: 20 req/s", "rate: 20 rps", 'small.yaml:12: unknown unit "rps"'),
        (
            "requests: 40",
            "requests: 0",
            "small.yaml:13: requests is 0: input should be greater than or equal to 1; write",
        ),
        (
            "requests: 40",
            "blocks: 3\n  requests: 40",
            "compared over blocks and workload.blocks is 3; write: blocks: 4 or more",
        ),
        (
            "prompt_tokens: [32, 256]",
            "prompt_tokens: [256, 32]",
            "small.yaml:14: prompt_tokens [256, 32] is empty; write: [32, 256]",
        ),
        ("prompt_tokens: [32, 256]", "prompt_tokens: [32]", "small.yaml:14: "),
        ("id: kl,", "id: orders,", 'small.yaml:18: gate id "orders" is already used; rename one'),
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
            "variants: [int4]",
            "variants: [int8]",
            'small.yaml:20: unknown variant "int8"; expected one of bf16, int4',
        ),
        (
            "schemes: [int4-gptq]",
            "schemes: [int8-bnb]",
            'small.yaml:18: gate "kl" applies to no variant; widen or remove it',
        ),
        (
            "schemes: [int4-gptq]",
            "schemes: [int4]",
            'small.yaml:18: schemes is "int4"; expected bf16',
        ),
    ],
)
def test_a_policy_that_cannot_be_carried_out_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert expected in refusal(tmp_path, replaced(old, new))


def test_speed_without_a_workload_is_refused(tmp_path: Path) -> None:
    text = re.sub(r"workload:\n(  .*\n)+", "", GOOD)
    assert 'perf/output_tok_per_s.ratio needs "workload"' in refusal(tmp_path, text)


def test_a_variant_without_a_gate_is_refused_because_absence_never_passes(tmp_path: Path) -> None:
    text = "".join(
        line
        for line in GOOD.splitlines(keepends=True)
        if "orders," not in line and "oom" not in line
    )
    assert 'no gate applies to variant "bf16", and absence never passes' in refusal(tmp_path, text)


def test_a_policy_without_gates_is_refused(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("gates:")] + "gates: []\n"
    assert "small.yaml:16: gates is []: " in refusal(tmp_path, text)


def test_every_problem_is_reported_in_the_order_of_lines(tmp_path: Path) -> None:
    text = replaced("20 req/s", "20").replace("{scheme: bf16}", "{scheme: bf61}")
    lines = refusal(tmp_path, text).splitlines()
    assert [line.split(":")[1] for line in lines] == ["4", "12"]
    assert (
        lines
        == [
            'small.yaml:1: unknown key "polcy"; expected one of policy, description, model, '
            "device, reference, champion, variants, calibration, golden_sets, distribution, "
            'workload, serving, confidence, gates; did you mean "policy"?'
        ]
        or len(lines) > 1
    )


def test_the_policy_of_the_demo_loads() -> None:
    path = Path(__file__).parents[2] / "gates" / "policies" / "demo.cpu.yaml"
    policy = load_policy(path)
    assert set(policy.variants) == {"bf16", "int8-bnb", "int4-nf4", "int4-gptq"}
    assert all(len(required_gates(policy, variant)) >= 15 for variant in policy.variants)
