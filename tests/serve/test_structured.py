"""Constrained decoding: what comes out is valid, whatever the model would rather say."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from quantgate_serve import constraints, structured
from quantgate_serve.engine import Engine
from quantgate_serve.request import FinishReason, Request, SamplingParams
from quantgate_serve.structured import GrammarError, StructuredMissingError, json_grammar

MakeEngine = Callable[..., Engine]
RunAll = Callable[[Engine, list[Request]], None]
ORDER = {
    "type": "object",
    "properties": {
        "item": {"enum": ["nuts", "bolts", "café"]},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 999},
        "note": {"type": ["string", "null"], "maxLength": 6},
    },
    "required": ["item", "quantity", "note"],
    "additionalProperties": False,
}


def ask(grammar: str, prompt: list[int], **params: Any) -> Request:
    values = {"max_tokens": 200, "temperature": 1.0, "grammar": grammar} | params
    return Request(prompt, SamplingParams(**values), eos_ids=frozenset({1}))


@pytest.mark.parametrize(
    "schema",
    [
        {"multipleOf": 999_999_937},  # kept the engine busy until its supervisor killed it
        {"type": "integer", "multipleOf": 10_007},
        {"type": "number", "multipleOf": 1.0007e-3},
        {"anyOf": [{"multipleOf": 10**4000 + 1}, {"multipleOf": 10**4100 + 1}]},
        {"allOf": [{"type": "integer", "multipleOf": 101}, {"multipleOf": 103}]},
    ],
)
def test_divisors_that_take_too_many_states_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match=r"multipleOf: .* above 10000"):
        json_grammar(schema)


@pytest.mark.parametrize(
    "divisor", [1, 7, 9_973, 0.01, 1000, 1_000_000_000, 2**40, 1e308, -0.0, True]
)
def test_other_divisors_are_left_to_the_library(divisor: float) -> None:
    with contextlib.suppress(GrammarError):
        json_grammar({"type": "number", "multipleOf": divisor})


def test_every_sample_of_a_random_model_is_valid(
    make_engine: MakeEngine, run_all: RunAll, tokenizer: Any
) -> None:
    engine = make_engine()
    requests = [ask(json_grammar(ORDER), [5, seed], seed=seed) for seed in range(2, 34)]
    run_all(engine, requests)
    texts = set()
    for request in requests:
        assert request.finish_reason is FinishReason.STOP
        text = tokenizer.decode(request.output_ids[:-1], skip_special_tokens=True)
        jsonschema.validate(json.loads(text), ORDER)
        texts.add(text)
    assert len(texts) > 25


def test_a_greedy_answer_is_valid_too_and_its_neighbours_are_free(
    make_engine: MakeEngine, run_all: RunAll, make_request: Callable[..., Request], tokenizer: Any
) -> None:
    prompt = tokenizer.encode("the order desk")
    alone = make_request(prompt)
    run_all(make_engine(), [alone])
    free, bound = make_request(prompt), ask(json_grammar(ORDER), prompt, temperature=0.0)
    run_all(make_engine(), [free, bound])
    assert free.output_ids == alone.output_ids
    json.loads(tokenizer.decode(bound.output_ids[:-1]))


def test_preemption_does_not_lose_the_place_in_the_grammar(
    make_engine: MakeEngine, run_all: RunAll
) -> None:
    def requests() -> list[Request]:
        return [ask(json_grammar(ORDER), [5] * 40 + [seed], seed=seed) for seed in range(2, 8)]

    roomy, tight = requests(), requests()
    run_all(make_engine(), roomy)
    run_all(make_engine(kv_tokens=256, prefix_cache=False), tight)
    assert sum(request.num_preemptions for request in tight) > 0
    assert [r.output_ids for r in tight] == [r.output_ids for r in roomy]


def test_a_matcher_may_be_forgotten_at_any_time(
    make_engine: MakeEngine, run_all: RunAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs() -> list[list[int]]:
        requests = [ask(json_grammar(ORDER), [5, seed], seed=seed) for seed in range(2, 8)]
        run_all(make_engine(), requests)
        return [request.output_ids for request in requests]

    kept = outputs()
    monkeypatch.setattr(constraints, "_MAX_MATCHERS", 1)
    monkeypatch.setattr(constraints, "_MAX_GRAMMARS", 1)
    assert outputs() == kept


def test_log_probabilities_are_the_models_own(make_engine: MakeEngine, run_all: RunAll) -> None:
    request = ask(json_grammar({"type": "object"}), [5, 6], max_tokens=1, num_logprobs=3)
    run_all(make_engine(), [request])
    (entry,) = request.logprobs
    assert entry.logprob < entry.top[0][1] < 0.0


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"not": {}}, "Unimplemented"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"$ref": "http://example.org/schema"}, "does not fetch"),
        ({"enum": []}, "Unsatisfiable"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "Unsatisfiable"),
        ({"type": "string", "pattern": "("}, "cannot be"),
        ({"type": "string", "description": "x" * 100_000}, "the limit is 100000"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        json_grammar(schema)


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5_000):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="nested too deeply"):
        json_grammar(schema)


def test_without_the_library_the_reason_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(structured, "find_spec", lambda _: None)
    with pytest.raises(StructuredMissingError, match=r"quantgate\[structured\]"):
        json_grammar({})


@pytest.mark.slow
def test_ten_thousand_samples_of_random_schemas_are_valid(
    make_engine: MakeEngine, run_all: RunAll, tokenizer: Any, llama_folder: Path
) -> None:
    leaves: list[dict[str, Any]] = [
        {"type": "integer", "minimum": -5, "maximum": 5},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"enum": ["a", 1, None]},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"type": "string", "maxLength": 3},
        {"type": "boolean"},
    ]
    engine = make_engine(max_batch_size=64, max_batched_tokens=256)
    num_valid = 0
    for number in range(40):
        names = [f"k{index}" for index in range(1 + number % 3)]
        schema = {
            "type": "object",
            "properties": {
                name: leaves[(number + 2 * index) % len(leaves)] for index, name in enumerate(names)
            },
            "required": names,
            "additionalProperties": False,
        }
        requests = [ask(json_grammar(schema), [5, 6], seed=seed) for seed in range(250)]
        run_all(engine, requests)
        for request in requests:
            if request.finish_reason is FinishReason.STOP:
                text = tokenizer.decode(request.output_ids[:-1], skip_special_tokens=True)
                jsonschema.validate(json.loads(text), schema)
                num_valid += 1
    assert num_valid > 9_900
