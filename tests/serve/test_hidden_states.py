"""Embeddings out of the batch: the mean of the last hidden states, whoever shares the step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from quantgate_serve import offline
from quantgate_serve.engine import Engine
from quantgate_serve.hidden_states import HiddenStates
from quantgate_serve.request import FinishReason, Priority, Request, SamplingParams

MakeEngine = Callable[..., Engine]
MakeRequest = Callable[..., Request]
Prompts = Callable[[int], list[list[int]]]
RunAll = Callable[[Engine, list[Request]], None]

# Each goes another way to its head: the short one, a scaled one, a projection in front of it.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "cohere": ("CohereConfig", {}),
    "granite": ("GraniteConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
}


def mean_direction(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0].float().mean(dim=0)
    return hidden / hidden.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_is_the_mean_of_the_model_s_last_hidden_states(
    family: str,
    save_model: Callable[..., Path],
    config_of: Callable[..., Any],
    make_engine: MakeEngine,
    make_request: MakeRequest,
    prompts: Prompts,
    run_all: RunAll,
    generate: Callable[..., list[int]],
) -> None:
    kind, changes = FAMILIES[family]
    folder = save_model(config_of(getattr(transformers, kind), **changes), dtype=torch.bfloat16)
    embedded = [make_request(prompt, max_tokens=0, embeds=True) for prompt in prompts(6)]
    texts = [make_request(prompt) for prompt in prompts(5)]
    run_all(make_engine(folder), [*texts[:3], *embedded, *texts[3:]])
    model = offline.load_model(folder, device="cpu").model
    for request in embedded:
        expected = mean_direction(model, request.prompt_ids)
        torch.testing.assert_close(torch.tensor(request.embedding), expected, atol=2e-5, rtol=0)
        assert (request.output_ids, request.finish_reason) == ([], FinishReason.LENGTH)
    for request in texts:
        assert request.output_ids == generate(folder, request.prompt_ids)
        assert request.embedding is None


def test_a_prompt_that_lost_its_pages_is_counted_once(
    make_engine: MakeEngine, llama_folder: Path
) -> None:
    engine = make_engine(kv_tokens=160, max_batched_tokens=8)
    params = SamplingParams(max_tokens=0, embeds=True)
    embedded = Request(list(range(2, 62)), params, priority=Priority.BULK)
    engine.submit([embedded])
    for _ in range(3):
        engine.step()
    assert 0 < embedded.num_computed < embedded.num_prompt
    urgent = SamplingParams(max_tokens=4, ignore_eos=True)
    engine.submit([Request([7] * 150, urgent, priority=Priority.INTERACTIVE)])
    while engine.has_work:
        engine.step()
    assert embedded.num_preemptions == 1
    model = offline.load_model(llama_folder, device="cpu").model
    expected = mean_direction(model, embedded.prompt_ids)
    torch.testing.assert_close(torch.tensor(embedded.embedding), expected, atol=2e-5, rtol=0)


def test_an_embedding_that_is_no_number_ends_its_request_alone(
    make_engine: MakeEngine, make_request: MakeRequest, run_all: RunAll
) -> None:
    engine = make_engine(prefix_cache=False)
    run = engine._runner._forward

    def spoil(readout: Any, num_decodes: int) -> torch.Tensor:
        logits = run(readout, num_decodes)
        taken = engine._runner._hidden_states._taken
        if taken is not None and any(chunk.request is bad for chunk in readout.chunks):
            taken[0] = torch.nan
        return logits

    engine._runner._forward = spoil  # type: ignore[method-assign]
    bad, good = (make_request([5, 6, length], max_tokens=0, embeds=True) for length in (7, 8))
    run_all(engine, [bad, good])
    assert bad.error is not None
    assert (bad.error.code, bad.embedding) == ("non_finite_logits", None)
    assert good.error is None
    assert good.embedding is not None


def test_what_is_set_apart_never_reaches_the_head() -> None:
    seen: list[tuple[int, ...]] = []
    head = nn.Linear(4, 9)
    states = HiddenStates(head)
    head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    hidden = torch.arange(24.0).view(1, 6, 4)
    states.expect(2)
    head(hidden)
    assert torch.equal(states.take(), hidden[0, 4:])
    head(hidden)
    assert seen == [(1, 4, 4), (1, 6, 4)]


def test_without_a_head_there_is_nothing_to_embed_with() -> None:
    states = HiddenStates(None)
    states.expect(1)
    with pytest.raises(RuntimeError, match="no head"):
        states.take()
