"""A policy's sections: their defaults, and what is refused in one of them alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quantgate.units import Quantity

if TYPE_CHECKING:
    from conftest import SmallPolicy


def test_what_is_not_written_has_the_documented_default(small_policy: SmallPolicy) -> None:
    policy = small_policy.load()
    assert (policy.device, policy.reference, policy.champion) == ("auto", "source", "bf16")
    assert policy.serving.timeout == Quantity(60.0, "s")
    assert policy.serving.caches is False


def test_caches_are_on_where_the_policy_says_so(small_policy: SmallPolicy) -> None:
    policy = small_policy.load("serving: {caches: on}\n" + small_policy.text)
    assert policy.serving.caches is True
    refusal = small_policy.refusal("serving: {caches: 64}\n" + small_policy.text)
    assert "caches is 64; expected true or false" in refusal


def test_context_window_and_kernels_are_the_servers_own_unless_they_are_written(
    small_policy: SmallPolicy,
) -> None:
    serving = small_policy.load().serving
    assert (serving.max_context, serving.admission_window) == (None, None)
    assert serving.native_kernels is True
    block = "serving: {max_context: 1024, admission_window: 5 ms, native_kernels: off}\n"
    serving = small_policy.load(block + small_policy.text).serving
    assert (serving.max_context, serving.admission_window) == (1024, Quantity(5.0, "ms"))
    assert serving.native_kernels is False


def test_a_variant_that_is_brought_needs_no_calibration(small_policy: SmallPolicy) -> None:
    text = small_policy.replaced("calibration: {path: text}\n", "").replace(
        "group_size: 128}", "path: elsewhere/gptq}"
    )
    assert not small_policy.load(text).variants["int4"].is_calibrated


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "model: demo",
            "model: demo\nserving: {admission_window: 51 ms}",
            "small.yaml:3: 51 ms is more than 50 ms; write: 50 ms",
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
            "bf16: {scheme: bf16}",
            "bf16: {scheme: bf16, group_size: 64}",
            'small.yaml:4: "group_size" is not for scheme "bf16"; remove it',
        ),
        (
            "group_size: 128}",
            "options: {group_size: 64}}",
            "small.yaml:5: group_size is no option; write beside scheme: group_size: 128",
        ),
        ("rate: 20 req/s", "rate: 20", "small.yaml:12: 20 has no unit; write: 20 req/s"),
        (
            "rate: 20 req/s",
            "rate: 20 tok/s",
            'small.yaml:12: "20 tok/s" is not a request rate; write: 20 req/s',
        ),
        ("rate: 20 req/s", "rate: 20 rps", 'small.yaml:12: unknown unit "rps"'),
        (
            "prompt_tokens: [32, 256]",
            "prompt_tokens: [256, 32]",
            "small.yaml:14: prompt_tokens [256, 32] is empty; write: [32, 256]",
        ),
        ("prompt_tokens: [32, 256]", "prompt_tokens: [32]", "small.yaml:14: "),
    ],
)
def test_what_no_section_may_say_is_refused_with_its_line(
    small_policy: SmallPolicy, old: str, new: str, expected: str
) -> None:
    assert expected in small_policy.refusal(small_policy.replaced(old, new))
