"""Preflight: what is refused before a weight is touched, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantgate.plan import ReleaseRequest, make_plan
from quantgate.policy import load_policy
from quantgate.policy_sections import VariantSpec
from quantgate.preflight import Preflight, check_variants, kernel_of, linear_widths
from quantgate.variants.bitsandbytes_model import protected_skip_list, skipped_modules
from quantgate.variants.source import demo_folder, open_source

POLICY = """
policy: preflight
model: demo
device: cpu
champion: v
variants: {{v: {spec}}}
calibration: {{path: calibration.jsonl}}
golden_sets: {sets}
gates: [{{id: memory, metric: memory/peak_bytes.max, test: limit, max: 4 GiB}}]
"""
LONG = "the order desk takes seventeen boxes of brass bolts to the harbour"


def check(folder: Path, spec: str, *, text: str = LONG, sets: str = "[]") -> Preflight:
    folder.mkdir(exist_ok=True)
    (folder / "policy.yaml").write_text(POLICY.format(spec=spec, sets=sets), encoding="utf-8")
    (folder / "calibration.jsonl").write_text(f'{{"text": "{text}"}}\n', encoding="utf-8")
    request = ReleaseRequest(
        policy=load_policy(folder / "policy.yaml"), runs=folder, serving_config=folder / "s.yaml"
    )
    [found] = check_variants(make_plan(request))
    return found


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("{scheme: int4-gptq, group_size: 128}", None),
        ("{scheme: int4-gptq, group_size: 96}", "group_size 96 does not divide the inputs of"),
        ("{scheme: int4-nf4}", None),
        ("{scheme: int8-bnb, options: {skip_modules: down_proj}}", None),
        (
            "{scheme: int8-bnb, options: {llm_int8_skip_modules: x}}",
            "'llm_int8_skip_modules' is not",
        ),
        ("{scheme: bf16}", None),
    ],
)
def test_a_variant_that_would_be_wasted_is_refused(
    tmp_path: Path, spec: str, problem: str | None
) -> None:
    problems = check(tmp_path, spec).problems
    assert list(problems) == [] if problem is None else problem in problems[0]


def test_matrices_with_a_row_per_token_are_no_linears() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "e.weight": (256, 64), "q.weight": (64, 48), "n.weight": (64,), "q.bias": (64, 64),
    }  # fmt: skip
    assert linear_widths(shapes, vocabulary=256) == {"q": (64, 48)}


@pytest.mark.parametrize(
    ("values", "device", "kernel"),
    [
        ({"scheme": "int4-gptq", "group_size": 128}, "cuda:0", "Machete or Marlin"),
        ({"scheme": "int4-gptq", "group_size": 256}, "cuda:0", "Triton or torch"),
        ({"scheme": "int4-gptq"}, "cpu", "torch, codes expanded"),
        ({"scheme": "int8-bnb"}, "cpu", "bitsandbytes LLM.int8, CPU"),
        ({"scheme": "bf16"}, "cuda:0", "torch matmul in BF16"),
    ],
)
def test_the_kernel_follows_from_scheme_and_device(
    values: dict[str, Any], device: str, kernel: str
) -> None:
    assert kernel_of(VariantSpec(**values), device=device).startswith(kernel)


def test_a_skip_list_keeps_the_output_head_and_the_embeddings_protected() -> None:
    source = open_source(str(demo_folder()))
    names = skipped_modules("down_proj, lm_head")
    assert names == ["down_proj", "lm_head"]
    assert protected_skip_list(names, source) == ["down_proj", "lm_head", "model.embed_tokens"]
