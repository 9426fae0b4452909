"""Layers in C give the logits of the model's own forward, each row whatever is beside it."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quantgate_serve import offline
from quantgate_serve.attention.native_paged import NativeStep, build_step
from quantgate_serve.decoder import ShortDecoder, build_decoder
from quantgate_serve.kv.pool import PAGE_SIZE
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.native.decoder import PARTS, NativeDecoder, can_decode
from quantgate_serve.native.layer import find_kernels
from quantgate_serve.native.linear import NativeLinear
from quantgate_serve.page_tables import PageTables
from quantgate_serve.request import Request, SamplingParams
from quantgate_serve.scheduler import Chunk
from quantgate_serve.step_inputs import build_inputs

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="no C compiler or no AVX-512 here",
)

FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "biased_llama": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "scaled_llama": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "dynamic_llama": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "tied_llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "odd_vocabulary": (transformers.LlamaConfig, {"vocab_size": 391}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}),
}
IDS = list(range(5, 45))


class Case:
    """A native decoder over a KV storage of its own, and the logits that it should give."""

    def __init__(self, folder: Path) -> None:
        loaded = offline.load_model(folder, device="cpu")
        self.expected = offline.logits(loaded, IDS)
        self.weight_bytes = loaded.weight_bytes
        kernels = find_kernels()
        assert kernels is not None
        self.kernels = kernels
        decoder = build_decoder(loaded.model, pytest.fail, kernels)
        assert isinstance(decoder, NativeDecoder)
        self.decoder = decoder
        device = torch.device("cpu")
        self.kv = KVStorage(loaded.kv_shape, num_pages=8, page_size=PAGE_SIZE, device=device)
        config = loaded.model.config
        self.group = config.num_attention_heads // config.num_key_value_heads

    def step(self, pages: list[list[int]], starts: list[int], lengths: list[int]) -> NativeStep:
        """The step over the next `lengths` tokens of sequences in `pages`; ids are not read."""
        chunks = []
        for held, start, length in zip(pages, starts, lengths, strict=True):
            request = Request([2] * (start + length), SamplingParams())
            request.pages = held
            chunks.append(Chunk(request, start, length))
        tables = PageTables(width=8, null_page=8)
        inputs = build_inputs(chunks, tables, num_decodes=0, page_size=PAGE_SIZE)
        return build_step(self.kernels, self.kv, inputs, group=self.group)

    def run(self, start: int, end: int, rows: Sequence[int], *, threads: int = 1) -> Tensor:
        """Logits of `rows` of the step that computes IDS[start:end] in pages 2, 0, 1."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return self.decoder(
                torch.tensor(IDS[start:end]),
                torch.arange(start, end),
                self.step([[2, 0, 1]], [start], [end - start]),
                torch.tensor(rows),
            )
        finally:
            torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture
def make_case(
    save_model: Callable[..., Path], config_of: Callable[..., Any]
) -> Callable[[str], Case]:
    def make(family: str) -> Case:
        kind, changes = FAMILIES[family]
        return Case(save_model(config_of(kind, **changes)))

    return make


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_give_the_model_s_own_logits(
    family: str, threads: int, make_case: Callable[[str], Case]
) -> None:
    case = make_case(family)
    found = case.run(0, 40, [3, 39, 17], threads=threads)
    assert torch.allclose(found, case.expected[[3, 39, 17]], atol=1e-4)


def test_a_prompt_in_pieces_and_a_token_at_a_time_give_the_same_bits(
    make_case: Callable[[str], Case],
) -> None:
    case = make_case("llama")
    whole = case.run(0, 40, range(40))
    pieces = [case.run(0, 17, range(17)), case.run(17, 38, range(21), threads=2)]
    pieces += [case.run(38, 39, [0]), case.run(39, 40, [0])]
    assert torch.equal(torch.cat(pieces), whole)


def test_batch_mates_change_no_bit(make_case: Callable[[str], Case]) -> None:
    case = make_case("llama")
    alone = case.run(0, 40, [39])
    step = case.step([[5], [2, 0, 1], [6, 7]], [0, 39, 0], [9, 1, 20])
    ids = [*range(60, 69), IDS[39], *range(80, 100)]
    positions = [*range(9), 39, *range(20)]
    found = case.decoder(torch.tensor(ids), torch.tensor(positions), step, torch.tensor([8, 9, 29]))
    assert torch.equal(found[1], alone[0])


def test_a_row_may_be_read_more_than_once_and_more_rows_than_there_are_tokens(
    make_case: Callable[[str], Case],
) -> None:
    case = make_case("llama")
    found = case.run(0, 4, [3, 0, 3, 1, 2, 3])
    assert torch.allclose(found, case.expected[[3, 0, 3, 1, 2, 3]], atol=1e-4)


def test_weights_are_not_kept_twice(make_case: Callable[[str], Case]) -> None:
    case = make_case("llama")
    tensors = [*case.decoder.parameters(), *case.decoder.buffers()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert held == case.weight_bytes
    assert isinstance(case.decoder.lm_head, NativeLinear)


def test_what_the_time_is_spent_on_is_counted_where_asked(make_case: Callable[[str], Case]) -> None:
    case = make_case("llama")
    case.decoder.spent_ns = torch.zeros(len(PARTS), dtype=torch.int64)
    case.run(0, 40, [39])
    assert bool((case.decoder.spent_ns > 0).all())


def test_another_kind_of_step_is_refused(make_case: Callable[[str], Case]) -> None:
    case = make_case("llama")
    with pytest.raises(TypeError, match="takes a NativeStep, not object"):
        case.decoder(torch.tensor([1]), torch.tensor([0]), object(), torch.tensor([0]))


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"head_dim": 8}, torch.float32),
        ({"intermediate_size": 72}, torch.float32),
        ({"hidden_size": 72, "head_dim": 16}, torch.float32),
        ({}, torch.bfloat16),
    ],
)
def test_other_shapes_and_arithmetic_go_the_short_way(
    changes: dict[str, int],
    dtype: torch.dtype,
    save_model: Callable[..., Path],
    config_of: Callable[..., Any],
) -> None:
    config = config_of(transformers.LlamaConfig, **changes)
    folder = save_model(config, dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert not can_decode(model)
    assert isinstance(build_decoder(model, pytest.fail, find_kernels()), ShortDecoder)


def test_an_id_without_an_embedding_is_refused(make_case: Callable[[str], Case]) -> None:
    case = make_case("llama")
    last = case.decoder.config.vocab_size - 1
    for bad in (-1, last + 1):
        with pytest.raises(IndexError, match="of 3 ids one is not among"):
            _next_logits(case, [5, bad, 6])
    assert len(_next_logits(case, [5, last, 0])) == 1


def test_an_embedding_or_a_head_that_is_watched_is_called(
    make_case: Callable[[str], Case],
) -> None:
    case = make_case("llama")
    expected = _next_logits(case, [5, 6, 7])
    seen: list[str] = []
    for name in ("embed_tokens", "lm_head"):
        case.decoder.get_submodule(name).register_forward_hook(
            lambda *_, name=name: seen.append(name)
        )
    found = _next_logits(case, [5, 6, 7])
    assert torch.equal(found, expected)
    assert seen == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("position", [0, 1023, 1024, 5000])
def test_angles_of_a_position_are_the_model_s_own(
    position: int, make_case: Callable[[str], Case]
) -> None:
    case = make_case("scaled_llama")
    cos, sin, turns = case.decoder._angles.of(torch.tensor([3, position]))
    expected = case.decoder.rotary(torch.empty(0), torch.tensor([[3, position]]))
    half = cos.shape[1]
    for found, wanted in zip((cos, sin), expected, strict=True):
        assert torch.allclose(found[turns], wanted[0, :, :half], atol=1e-6)


def test_angles_that_depend_on_the_longest_sequence_are_computed_in_each_step(
    make_case: Callable[[str], Case],
) -> None:
    case = make_case("dynamic_llama")
    angles = case.decoder._angles
    alone = angles.of(torch.tensor([3]))
    beside_a_long_one = angles.of(torch.tensor([3, 4000]))
    assert alone[2].tolist() == [0]
    assert beside_a_long_one[2].tolist() == [0, 1]
    assert not torch.allclose(alone[0][0], beside_a_long_one[0][0])


def _next_logits(case: Case, ids: list[int]) -> Tensor:
    count = len(ids)
    step = case.step([[0]], [0], [count])
    return case.decoder(torch.tensor(ids), torch.arange(count), step, torch.tensor([count - 1]))
