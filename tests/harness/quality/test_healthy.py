"""The healthy twin: each scheme's rounding, on a small model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantgate.gate import SCHEMES, Scheme
from quantgate.quality.healthy import make_healthy


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def relative_error(scheme: Scheme) -> float:
    before, after = small_model(), small_model()
    make_healthy(after, scheme, group_size=64)
    name = "model.layers.0.mlp.up_proj.weight"
    old, new = before.state_dict()[name], after.state_dict()[name]
    return float((new - old).norm() / old.norm())


@pytest.mark.parametrize(
    ("scheme", "low", "high"),
    [
        # Normal weights; field values of trained ones are of the same size.
        ("bf16", 0.001, 0.002),
        ("int8-bnb", 0.004, 0.009),
        ("int8-gptq", 0.003, 0.008),
        ("int4-nf4", 0.08, 0.11),
        ("int4-gptq", 0.08, 0.13),
    ],
)
def test_each_scheme_rounds_by_as_much_as_its_bits_say(
    scheme: Scheme, low: float, high: float
) -> None:
    assert low < relative_error(scheme) < high


def test_a_cast_to_bf16_rounds_every_parameter() -> None:
    model = small_model()
    make_healthy(model, "bf16", group_size=64)
    for value in model.parameters():
        assert torch.equal(value, value.bfloat16().float())


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "bf16"])
def test_embeddings_head_and_norms_stay_as_they_are(scheme: Scheme) -> None:
    before, after = small_model(), small_model()
    make_healthy(after, scheme, group_size=64)
    for name, value in before.state_dict().items():
        is_linear = name.endswith("_proj.weight")
        assert torch.equal(value, after.state_dict()[name]) is not is_linear


def test_a_group_that_does_not_divide_a_row_is_the_row() -> None:
    model = small_model()
    make_healthy(model, "int4-gptq", group_size=96)
    row = model.state_dict()["model.layers.0.self_attn.q_proj.weight"][0]
    assert len(row.unique()) <= 16


def test_inputs_of_llm_int8_are_rounded_but_for_columns_with_an_outlier() -> None:
    linear = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.eye_(linear.weight)

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def get_output_embeddings(self) -> Any:
            return None

    make_healthy(Holder(), "int8-bnb", group_size=0)
    with torch.no_grad():
        seen = linear(torch.tensor([[1.0, 0.3333, 7.7777, 0.0], [0.5, 0.1111, 1.2345, 0.0]]))
    assert seen[:, 2].tolist() == pytest.approx([7.7777, 1.2345])
    assert float(seen[0, 1]) == pytest.approx(round(0.3333 * 127) / 127)
    assert float(seen[1, 1]) == pytest.approx(round(0.1111 / 0.5 * 127) * 0.5 / 127)


def test_a_scheme_without_a_twin_is_an_error_and_not_left_unrounded() -> None:
    with pytest.raises(ValueError, match="no healthy twin for scheme 'int3'"):
        make_healthy(small_model(), "int3", group_size=64)
