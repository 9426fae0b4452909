"""/openapi.json says what the routes do."""

from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from quantgate_serve.http import answers, openapi
from quantgate_serve.http.app import build_app
from quantgate_serve.http.service import Service


def test_it_is_served_and_names_what_it_refers_to(shared_url: str) -> None:
    document = httpx.get(f"{shared_url}/openapi.json").json()
    known = document["components"]["schemas"]

    def check(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                assert value["$ref"].removeprefix("#/components/schemas/") in known
            for inner in value.values():
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)

    check(document)


def test_every_route_is_described() -> None:
    described = set(openapi.describe(needs_key=False)["paths"])
    service = Service.__new__(Service)  # routes are added without a look at the engine
    service._keyring = None
    app = build_app(service)
    paths = {route.path.replace(":path", "") for route in app.routes}  # type: ignore[attr-defined]
    assert paths - {"/openapi.json"} == described


def test_keys_are_described_where_they_are_asked_for() -> None:
    paths = openapi.describe(needs_key=True)["paths"]
    assert paths["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in paths["/ready"]["get"]


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/completions", {"prompt": "tea"}, answers.CompletionAnswer),
        (
            "/v1/completions",
            {"prompt": [[5], [6]], "n": 2, "logprobs": 2, "echo": True, "return_token_ids": True},
            answers.CompletionAnswer,
        ),
        (
            "/v1/completions",
            {"prompt": [5], "logprob_token_ids": [7]},
            answers.CompletionAnswer,
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "tea"}], "logprobs": True, "top_logprobs": 2},
            answers.ChatAnswer,
        ),
        ("/v1/completions", {"prompt": 3}, answers.ErrorAnswer),
    ],
)
def test_answers_have_the_described_shape(
    shared_url: str, path: str, body: dict[str, Any], model: type[BaseModel]
) -> None:
    answer = httpx.post(f"{shared_url}{path}", json=body | {"max_tokens": 3})
    model.model_validate_json(answer.content)


def test_the_model_pages_have_the_described_shape(shared_url: str) -> None:
    answers.ModelList.model_validate_json(httpx.get(f"{shared_url}/v1/models").content)
    answers.ModelCard.model_validate_json(httpx.get(f"{shared_url}/v1/models/tiny").content)


def test_the_model_card_names_what_computes_every_linear(shared_url: str) -> None:
    card = answers.ModelCard.model_validate_json(httpx.get(f"{shared_url}/v1/models/tiny").content)
    assert card.kernels
    assert all(kernel.linears > 0 and kernel.slow is None for kernel in card.kernels)
    counted = {
        line.split('kernel="')[1].split('"')[0]: float(line.split()[-1])
        for line in httpx.get(f"{shared_url}/metrics").text.splitlines()
        if line.startswith("quantgate_linears{")
    }
    assert {kernel.name: kernel.linears for kernel in card.kernels} == counted
