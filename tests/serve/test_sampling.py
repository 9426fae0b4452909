"""Which token comes next, and what its log-probability is."""

import math
from collections import Counter

import pytest
import torch

from quantgate_serve import sampling
from quantgate_serve.request import SamplingParams
from quantgate_serve.sampling import choose_tokens, token_logprobs, uniform


def draws(logits: torch.Tensor, count: int, **params: float) -> Counter[int]:
    wanted = [SamplingParams(seed=5, **params)] * count  # type: ignore[arg-type]
    return Counter(choose_tokens(logits.expand(count, -1), wanted, list(range(count))).tolist())


def test_zero_temperature_takes_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert choose_tokens(logits, [SamplingParams()] * 2, [0, 0]).tolist() == [1, 0]


def test_samples_follow_the_softmax() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    found = draws(probabilities.log(), 20_000, temperature=1.0)
    for token, probability in enumerate(probabilities[0].tolist()):
        # Four standard errors of a binomial share at n = 20,000.
        assert found[token] / 20_000 == pytest.approx(probability, abs=0.015)


def test_the_largest_draw_still_gives_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: 1.0 - 2.0**-53)
    logits = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=3)):
        assert sampling.choose_tokens(logits, [params], [0]).tolist() == [1]


def test_temperature_sharpens() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert draws(logits, 4000, temperature=0.25)[0] > draws(logits, 4000, temperature=1.0)[0]


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.8, "top_k": 3}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 99}, {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_cut_the_tail(params: dict[str, float], allowed: set[int]) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert set(draws(logits, 500, temperature=1.0, **params)) == allowed


def test_a_request_draws_the_same_whoever_shares_its_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    # Half of them cut the tail, half draw from all tokens.
    params = [
        SamplingParams(temperature=0.9, top_p=0.9 if seed % 2 else 1.0, seed=seed)
        for seed in range(6)
    ]
    together = choose_tokens(logits, params, [3] * 6).tolist()
    alone = [choose_tokens(logits[i : i + 1], params[i : i + 1], [3]).tolist()[0] for i in range(6)]
    assert together == alone


def test_draws_are_uniform_and_differ_by_seed_and_position() -> None:
    values = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert len(set(values)) == 2000
    assert all(0.0 < value < 1.0 for value in values)
    assert sum(values) / 2000 == pytest.approx(0.5, abs=0.03)


def test_logprobs_are_raw_and_ordered() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    expected = torch.log_softmax(logits, -1)[0]
    (found,) = token_logprobs(logits, [2], num_top=[2], wanted_ids=[(0, 3)])
    assert found.logprob == pytest.approx(expected[2].item())
    assert [token for token, _ in found.top] == [1, 2]
    assert found.of_token_ids == pytest.approx((expected[0].item(), expected[3].item()))


def test_log_probs_of_a_few_ids_are_those_of_the_whole_vocabulary() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(7)) * 30
    logits[1, 40] = -math.inf
    wanted = [(), (40, 0), (299,), (3, 3, 3), ()]
    expected = torch.log_softmax(logits.double(), -1)
    found = token_logprobs(logits, [9, 8, 7, 6, 5], num_top=[0] * 5, wanted_ids=wanted)
    for row, (one, ids) in enumerate(zip(found, wanted, strict=True)):
        assert one.top == ()
        values = [one.logprob, *one.of_token_ids]
        assert values == pytest.approx([expected[row, id].item() for id in (one.token_id, *ids)])
    assert found[1].of_token_ids[0] == -math.inf


def test_a_rows_log_probs_depend_on_no_other_row() -> None:
    logits = torch.randn(33, 300, generator=torch.Generator().manual_seed(8)) * 9
    ids = [(1, 2)] * 33
    together = token_logprobs(logits, [0] * 33, num_top=[0] * 33, wanted_ids=ids)
    alone = [
        token_logprobs(row, [0], num_top=[0], wanted_ids=ids[:1])[0] for row in logits.split(1)
    ]
    assert together == alone
