"""The roofline's formulas against cases worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate_serve.roofline import Ceilings, ModelCost, decode_tokens_per_s, step_work

# 2 layers, 4 query heads of 8, 2 KV heads, hidden 32, FP32 throughout.
TINY = ModelCost(
    step_bytes=1000,
    row_bytes=128,
    layer_weights=200,
    head_weights=50,
    kv_bytes=256,
    attention_width=64,
)
# Llama-3.1-8B in BF16: 8,030,261,248 parameters, of which the embedding table has 525,336,576.
LLAMA_8B = ModelCost(
    step_bytes=2 * (8_030_261_248 - 525_336_576),
    row_bytes=2 * 4096,
    layer_weights=32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336),
    head_weights=4096 * 128_256,
    kv_bytes=131_072,
    attention_width=32 * 32 * 128,
)
H200 = Ceilings(bytes_per_s=4.8e12, flops_per_s=989e12)


def test_one_decode_reads_weights_a_row_and_its_context_and_writes_itself() -> None:
    work = step_work(TINY, [(9, 1)], num_rows=1)
    assert work.num_bytes == 1000 + 128 + 10 * 256 + 256
    assert work.num_flops == 2 * 200 + 2 * 50 + 4 * 64 * 10


def test_a_prompt_of_three_meets_one_two_and_three_tokens() -> None:
    work = step_work(TINY, [(0, 3)], num_rows=1)
    assert work.num_bytes == 1000 + 3 * 128 + 3 * 256 + 3 * 256
    assert work.num_flops == 3 * 400 + 100 + 4 * 64 * (1 + 2 + 3)


def test_a_later_chunk_meets_all_that_is_behind_it() -> None:
    work = step_work(TINY, [(4, 2)], num_rows=0)
    assert work.num_flops == 2 * 400 + 4 * 64 * (5 + 6)


def test_the_weights_are_read_once_however_many_requests_share_the_step() -> None:
    one = step_work(TINY, [(9, 1)], num_rows=1)
    four = step_work(TINY, [(9, 1)] * 4, num_rows=4)
    assert four.num_bytes - one.num_bytes == 3 * (128 + 11 * 256)
    assert four.num_flops == 4 * one.num_flops


@given(st.integers(0, 500), st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 3))
def test_cutting_a_prompt_into_chunks_changes_no_operation(
    behind: int, pieces: list[int], num_rows: int
) -> None:
    whole = step_work(TINY, [(behind, sum(pieces))], num_rows=num_rows)
    at, flops = behind, 0
    for length in pieces:
        flops += step_work(TINY, [(at, length)], num_rows=0).num_flops
        at += length
    assert flops + 2 * num_rows * TINY.head_weights == whole.num_flops


def test_an_8b_model_decodes_at_most_320_tokens_per_second_alone_on_an_h200() -> None:
    rate = decode_tokens_per_s(LLAMA_8B, H200, batch=1, context=1)
    assert rate == pytest.approx(320, rel=0.005)


def test_32_sequences_of_4k_are_bound_by_their_keys_and_values() -> None:
    rate = decode_tokens_per_s(LLAMA_8B, H200, batch=32, context=4096)
    assert rate == pytest.approx(4_800, rel=0.02)


def test_a_long_prompt_is_bound_by_arithmetic_at_61_thousand_tokens_per_second() -> None:
    work = step_work(LLAMA_8B, [(0, 8)], num_rows=1)
    per_token = work.num_flops / 8
    assert H200.flops_per_s / per_token == pytest.approx(61_600, rel=0.15)
