"""Native attention gives what plain attention over each sequence's own tokens gives."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from quantgate_serve.attention import native_paged
from quantgate_serve.attention.native_paged import build_step
from quantgate_serve.kv.storage import KVShape, KVStorage
from quantgate_serve.native.layer import PAGE, can_attend, find_kernels
from quantgate_serve.page_tables import PageTables
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.scheduler import Chunk
from quantgate_serve.step_inputs import StepInputs, build_inputs

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")

NUM_PAGES = 160
# FP32 sums of up to 600 terms in another order, and a polynomial for exp.
TOLERANCE = 2e-5
SCALE = 0.3
# Where the sequence is, and how many tokens of it this step computes.
Part = tuple[int, int]


class Case:
    """Sequences with random keys and values, of which this step computes the last tokens."""

    def __init__(
        self, parts: list[Part], *, kv_heads: int, group: int, head_dim: int, seed: int
    ) -> None:
        self.parts, self.group = parts, group
        self.generator = torch.Generator().manual_seed(seed)
        shape = KVShape(2, kv_heads, head_dim, torch.float32)
        self.kv = KVStorage(shape, num_pages=NUM_PAGES, page_size=PAGE, device=torch.device("cpu"))
        for tensor in [*self.kv.keys, *self.kv.values]:
            tensor.fill_(float("nan"))  # what nobody has written must not be read
        free = torch.randperm(NUM_PAGES, generator=self.generator).tolist()
        self.pages = [
            [free.pop() for _ in range(-(-(start + length) // PAGE))] for start, length in parts
        ]
        # [heads, tokens, D] of each sequence, and its query over the new tokens.
        self.keys = [self._random(kv_heads, sum(part), head_dim) for part in parts]
        self.values = [self._random(kv_heads, sum(part), head_dim) for part in parts]
        self.queries = [self._random(kv_heads * group, part[1], head_dim) for part in parts]
        for (start, _), pages, key, value in zip(
            parts, self.pages, self.keys, self.values, strict=True
        ):
            for position in range(start):
                page, offset = pages[position // PAGE], position % PAGE
                self.kv.keys[1][page, :, offset] = key[:, position]
                self.kv.values[1][page, :, offset] = value[:, position]

    def inputs(self, rows: list[int]) -> StepInputs:
        """Those of a step that computes the sequences `rows`."""
        chunks = []
        for row in rows:
            start, length = self.parts[row]
            request = Request([2] * (start + length), SamplingParams())
            request.pages = self.pages[row]
            chunks.append(Chunk(request, start, length))
        tables = PageTables(width=NUM_PAGES, null_page=NUM_PAGES)
        return build_inputs(chunks, tables, num_decodes=0, page_size=PAGE)

    def attend(self, rows: list[int]) -> list[Tensor]:
        """[N, new tokens, D] of each of the sequences `rows`, computed in one step."""
        kernels = find_kernels()
        assert kernels is not None
        step = build_step(kernels, self.kv, self.inputs(rows), group=self.group)
        new = [
            torch.cat(
                [
                    self.queries[row],
                    self.keys[row][:, self.parts[row][0] :],
                    self.values[row][:, self.parts[row][0] :],
                ]
            )
            for row in rows
        ]
        heads = torch.cat(new, dim=1).transpose(0, 1).contiguous()  # as one product gives them
        num_heads = self.queries[0].shape[0]
        query, key, value = heads.split(
            (num_heads, num_heads // self.group, num_heads // self.group), dim=1
        )
        output = native_paged.attend(step, 1, query, key, value, SCALE)
        found = output.transpose(0, 1).split([self.parts[row][1] for row in rows], dim=1)
        return list(found)

    def expected(self, row: int) -> Tensor:
        start, length = self.parts[row]
        mask = torch.ones(length, start + length, dtype=torch.bool).tril(start)
        return functional.scaled_dot_product_attention(
            self.queries[row].double(),
            self.keys[row].double().repeat_interleave(self.group, dim=0),
            self.values[row].double().repeat_interleave(self.group, dim=0),
            attn_mask=mask,
            scale=SCALE,
        ).float()

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


# Decodes, whole prompts and later chunks; around the ends of pages and of tiles.
PARTS = st.one_of(
    st.tuples(st.integers(1, 70), st.just(1)),
    st.tuples(st.sampled_from([15, 16, 17, 255, 256, 257, 300]), st.just(1)),
    st.tuples(st.just(0), st.integers(1, 70)),
    st.tuples(st.integers(1, 40), st.integers(2, 40)),
)


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(PARTS, min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 4]),
    group=st.sampled_from([1, 2, 3, 8, 32]),
    head_dim=st.sampled_from([16, 48, 64, 80, 128]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_native_attention_equals_attention_over_each_sequence(
    parts: list[Part], kv_heads: int, group: int, head_dim: int, threads: int, seed: int
) -> None:
    case = Case(parts, kv_heads=kv_heads, group=group, head_dim=head_dim, seed=seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = case.attend(list(range(len(parts))))
    finally:
        torch.set_num_threads(before)
    for row, output in enumerate(found):
        assert torch.allclose(output, case.expected(row), atol=TOLERANCE)


def test_this_step_s_keys_and_values_are_stored_and_nothing_else() -> None:
    case = Case([(14, 5), (40, 1)], kv_heads=2, group=2, head_dim=16, seed=1)
    before = case.kv.keys[1].clone(), case.kv.values[1].clone()
    case.attend([0, 1])
    for now, then, sequences in zip(
        (case.kv.keys[1], case.kv.values[1]), before, (case.keys, case.values), strict=True
    ):
        for (start, length), pages, tokens in zip(case.parts, case.pages, sequences, strict=True):
            for position in range(start, start + length):
                page, offset = pages[position // PAGE], position % PAGE
                assert torch.equal(now[page, :, offset], tokens[:, position])
                then[page, :, offset] = tokens[:, position]
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))
    assert bool(case.kv.keys[0].isnan().all()), "another layer was written"


def test_a_sequence_gets_the_same_bits_alone_as_in_company() -> None:
    case = Case([(30, 1), (0, 37), (299, 1), (18, 20)], kv_heads=4, group=2, head_dim=64, seed=2)
    together = case.attend([0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(case.attend([row])[0], together[row])


def test_threads_change_no_bit() -> None:
    case = Case([(900, 1), (0, 70), (299, 1)], kv_heads=4, group=2, head_dim=64, seed=6)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.cat(case.attend([0, 1, 2]), dim=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_key_that_is_no_number_makes_the_output_none() -> None:
    case = Case([(20, 1)], kv_heads=1, group=1, head_dim=16, seed=3)
    case.kv.keys[1][case.pages[0][0], :, 3] = float("nan")
    assert bool(case.attend([0])[0].isnan().all())


def test_keys_that_lie_elsewhere_than_the_query_are_taken_all_the_same() -> None:
    """transformers' own forward gives three tensors, not parts of one."""
    case = Case([(0, 20)], kv_heads=2, group=2, head_dim=16, seed=4)
    kernels = find_kernels()
    assert kernels is not None
    step = build_step(kernels, case.kv, case.inputs([0]), group=2)
    parts = (case.queries[0], case.keys[0], case.values[0])
    query, key, value = (tensor.transpose(0, 1) for tensor in parts)
    output = native_paged.attend(step, 1, query, key, value, SCALE)
    assert torch.allclose(output.transpose(0, 1), case.expected(0), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "num_heads", "expected"),
    [
        ({}, 4, True),
        ({"dtype": torch.bfloat16}, 4, False),
        ({"head_dim": 24}, 4, False),
        ({"head_dim": 256}, 4, True),
        ({"head_dim": 272}, 4, False),
        ({"num_kv_heads": 1}, 32, True),
        ({"num_kv_heads": 1}, 33, False),
    ],
)
def test_other_shapes_are_left_to_torch(
    changes: dict[str, object], num_heads: int, expected: bool
) -> None:
    values = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32} | changes
    kv = KVStorage(
        KVShape(**values),  # type: ignore[arg-type]
        num_pages=1,
        page_size=PAGE,
        device=torch.device("cpu"),
    )
    assert can_attend(kv, num_heads) is expected
