"""Layers in C give the logits of the model's own forward, each row whatever is beside it."""

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from quantgate_serve import offline
from quantgate_serve.decoder import ShortDecoder, build_decoder
from quantgate_serve.finite import all_finite
from quantgate_serve.kv.pool import PAGE_SIZE
from quantgate_serve.kv.storage import KVStorage
from quantgate_serve.native.decoder import PARTS, Computed, NativeDecoder
from quantgate_serve.native.decoder_layers import can_decode
from quantgate_serve.native.layer import find_kernels
from quantgate_serve.native.linear import FEWEST_LANES, NativeLinear

pytestmark = pytest.mark.skipif(
    (kernels := find_kernels()) is None or kernels.lanes < FEWEST_LANES,
    reason="no C compiler or no AVX2 here",
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
CPU = torch.device("cpu")


class Case:
    """A native decoder over a KV storage of its own, and the logits that it should give."""

    def __init__(self, folder: Path) -> None:
        loaded = offline.load_model(folder, device="cpu")
        self.expected = offline.logits(loaded, IDS)
        self.weight_bytes = loaded.weight_bytes
        kernels = find_kernels()
        assert kernels is not None
        # Outputs that lie together in linear.c.
        self.panel = 2 * kernels.lanes
        decoder = build_decoder(loaded.model, pytest.fail, kernels)
        assert isinstance(decoder, NativeDecoder)
        self.decoder = decoder
        self.kv = KVStorage(loaded.kv_shape, num_pages=8, page_size=PAGE_SIZE, device=CPU)

    def compute(
        self,
        ids: Sequence[int],
        rows: Sequence[int],
        *,
        pages: Sequence[Sequence[int]],
        starts: Sequence[int],
        lengths: Sequence[int],
    ) -> Computed:
        """The step over `ids`: the next `lengths` tokens of sequences in `pages`."""
        table = np.full((len(pages), 8), 8, dtype=np.int32)
        chunks = array("q")
        for index, (held, start, length) in enumerate(zip(pages, starts, lengths, strict=True)):
            table[index, : len(held)] = held
            chunks.extend((index, start, length))
        return self.decoder.compute(self.kv, array("q", ids), chunks, table, array("q", rows))

    def run(self, start: int, end: int, rows: Sequence[int], *, threads: int = 1) -> Tensor:
        """Logits of `rows` of the step that computes IDS[start:end] in pages 2, 0, 1."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = self.compute(
                IDS[start:end], rows, pages=[[2, 0, 1]], starts=[start], lengths=[end - start]
            )
        finally:
            torch.set_num_threads(before)
        return found.logits.clone()

    def begin(self, ids: Sequence[int]) -> Computed:
        """The step over all of a sequence of 16 tokens at most, read at its last."""
        return self.compute(ids, [len(ids) - 1], pages=[[0]], starts=[0], lengths=[len(ids)])


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
    ids = [*range(60, 69), IDS[39], *range(80, 100)]
    pages = [[5], [2, 0, 1], [6, 7]]
    found = case.compute(ids, [8, 9, 29], pages=pages, starts=[0, 39, 0], lengths=[9, 1, 20]).logits
    assert torch.equal(found[1], alone[0])


# One tile, two of one panel, and many of two panels: those that fetch pages while they multiply.
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("together", [6, 14, 15, 29, 64])
def test_many_decodes_together_give_the_bits_of_each_alone(
    together: int, threads: int, make_case: Callable[[str], Case]
) -> None:
    case = make_case("llama")
    case.kv = KVStorage(case.kv.shape, num_pages=3 * together, page_size=PAGE_SIZE, device=CPU)
    pages = [[3 * n + 2, 3 * n, 3 * n + 1] for n in range(together)]
    lengths = [1 + 7 * n % 40 for n in range(together)]
    for held, length in zip(pages, lengths, strict=True):
        case.compute(IDS[:length], [length - 1], pages=[held], starts=[0], lengths=[length])
    new = [90 + n for n in range(together)]
    torch.set_num_threads(threads)
    ones = [1] * together
    found = case.compute(new, range(together), pages=pages, starts=lengths, lengths=ones)
    whole = found.logits.clone()
    torch.set_num_threads(1)
    for n in range(together):
        alone = case.compute([new[n]], [0], pages=[pages[n]], starts=[lengths[n]], lengths=[1])
        assert torch.equal(alone.logits[0], whole[n]), n


def test_results_of_a_long_prompt_are_not_kept(
    make_case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantgate_serve.native.workspace._MOST_KEPT_BYTES", 4 * 384 * 20)
    case = make_case("llama")
    assert case.decoder.config.vocab_size == 384
    kept = case.run(0, 20, range(20))
    memory = case.compute(IDS[:20], range(20), pages=[[2, 0]], starts=[0], lengths=[20]).memory
    long = case.compute(IDS, range(40), pages=[[2, 0, 1]], starts=[0], lengths=[40])
    assert long.memory is not memory
    again = case.compute(IDS[:9], range(9), pages=[[2, 0]], starts=[0], lengths=[9])
    assert again.memory is memory
    assert torch.equal(again.logits, kept[:9])


def test_a_row_may_be_read_more_than_once_and_more_rows_than_there_are_tokens(
    make_case: Callable[[str], Case],
) -> None:
    case = make_case("llama")
    found = case.run(0, 4, [3, 0, 3, 1, 2, 3])
    assert torch.allclose(found, case.expected[[3, 0, 3, 1, 2, 3]], atol=1e-4)


def test_threads_do_not_write_over_each_other_where_more_rows_are_read_than_there_are_tokens(
    make_case: Callable[[str], Case],
) -> None:
    case = make_case("llama")
    rows = [0, *range(40), *range(40)]  # as where every token is embedded, and more
    alone = case.run(0, 40, rows)
    for _ in range(20):
        assert torch.equal(case.run(0, 40, rows, threads=3), alone)


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
    kernels = find_kernels()
    assert kernels is not None
    assert not can_decode(model, kernels)
    assert isinstance(build_decoder(model, pytest.fail, kernels), ShortDecoder)


def test_an_id_without_an_embedding_is_refused(make_case: Callable[[str], Case]) -> None:
    case = make_case("llama")
    last = case.decoder.config.vocab_size - 1
    for bad in (-1, last + 1):
        with pytest.raises(IndexError, match="of 3 ids one is not among"):
            case.begin([5, bad, 6])
    assert len(case.begin([5, last, 0]).best) == 1


def test_an_embedding_or_a_head_that_is_watched_is_called(
    make_case: Callable[[str], Case],
) -> None:
    case = make_case("llama")
    expected = case.begin([5, 6, 7])
    logits = expected.logits.clone()
    seen: list[str] = []
    for name in ("embed_tokens", "lm_head"):
        case.decoder.get_submodule(name).register_forward_hook(
            lambda *_, name=name: seen.append(name)
        )
    found = case.begin([5, 6, 7])
    assert torch.equal(found.logits, logits)
    assert (found.best, found.is_finite) == (expected.best, True)
    assert seen == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_best_is_the_largest_of_each_row_the_first_of_equals(
    threads: int, make_case: Callable[[str], Case]
) -> None:
    case = make_case("llama")
    head = case.decoder.lm_head
    weight = head.weight
    before = weight.clone()
    # Two equal outputs, the same place in the second and in the fourth panel: 33 and 97 of 32 each.
    panels = weight.view(-1, head.in_features, case.panel)
    panels[3, :, 1] = panels[1, :, 1]
    torch.set_num_threads(threads)
    for scale in (1.0, 100.0, -100.0):
        panels[1, :, 1] = scale * before.view_as(panels)[1, :, 1]
        panels[3, :, 1] = panels[1, :, 1]
        found = case.compute(IDS, range(40), pages=[[2, 0, 1]], starts=[0], lengths=[40])
        assert found.best == found.logits.numpy().argmax(axis=-1).tolist()
        assert found.is_finite
    torch.set_num_threads(1)
    assert case.panel + 1 in found.best


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("output", [0, 5, 17, 383])
def test_logits_that_are_no_numbers_are_told(
    bad: float, output: int, make_case: Callable[[str], Case]
) -> None:
    case = make_case("biased_llama")
    head = case.decoder.lm_head
    panels = head.weight.view(-1, head.in_features, case.panel)
    panel = panels[output // case.panel, :, output % case.panel]
    panel.fill_(0.0)
    assert case.begin([5, 6]).is_finite
    panel[0] = bad
    # A weight of infinity gives infinity of one sign or the other, or NaN of both.
    found = case.begin([5, 6])
    expected = all_finite(found.logits)
    assert found.is_finite == bool(expected)
    assert not torch.isfinite(found.logits[0, output])


@pytest.mark.parametrize("position", [0, 1023, 1024, 5000])
def test_angles_of_a_position_are_the_model_s_own(
    position: int, make_case: Callable[[str], Case]
) -> None:
    angles = make_case("scaled_llama").decoder._angles
    while len(angles._cos) <= position:
        angles.more()
    expected = angles._rotary(torch.empty(0), torch.tensor([[position]]))
    for found, wanted in zip((angles._cos, angles._sin), expected, strict=True):
        assert torch.allclose(found[position], wanted[0, 0, : found.shape[1]], atol=1e-6)


def test_a_position_beyond_the_angles_so_far_gets_its_own(
    make_case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantgate_serve.native.angles._FEW_ANGLES", 3)
    case = make_case("llama")
    assert torch.allclose(case.run(0, 40, [39]), case.expected[[39]], atol=1e-4)
    assert len(case.decoder._angles._cos) == 48


def test_angles_that_depend_on_the_longest_sequence_are_computed_in_each_step(
    make_case: Callable[[str], Case],
) -> None:
    angles = make_case("dynamic_llama").decoder._angles
    *_, count, are_by_token = angles.of(array("q", [0, 3, 1]))
    alone = angles._cos[0].clone()
    assert (count, are_by_token) == (1, True)
    assert angles.of(array("q", [0, 3, 1, 1, 4000, 2]))[2] == 3
    assert not torch.allclose(alone, angles._cos[0])
