"""Embeddings through the engine, computed in its batch."""

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from quantgate_serve import offline

Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="module")
def url(serve: Serve) -> Iterator[str]:
    with serve("--kv-tokens", "4096", "--max-batched-tokens", "16") as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_vector_is_the_mean_of_the_last_hidden_states_of_all_chunks(
    url: str, llama_folder: Path, prompts: Callable[[int], list[list[int]]]
) -> None:
    inputs = [*prompts(8), [7] * 17]  # 17 tokens under a budget of 16: a chunk of one token
    answer = httpx.post(f"{url}/v1/embeddings", json={"input": inputs}, timeout=60).json()
    model = offline.load_model(llama_folder, device="cpu").model
    for ids, item in zip(inputs, answer["data"], strict=True):
        with torch.inference_mode():
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0].float().mean(dim=0)
        expected = (hidden / hidden.norm()).numpy()
        np.testing.assert_allclose(item["embedding"], expected, atol=2e-5)
    assert answer["usage"]["prompt_tokens"] == sum(len(ids) for ids in inputs)


def test_the_openai_client_reads_both_encodings(client: openai.OpenAI, url: str) -> None:
    # The client itself asks for base64 and decodes it.
    decoded = client.embeddings.create(model="tiny", input=["3 nuts", "tea"])
    floats = client.embeddings.create(model="tiny", input="tea", encoding_format="float")
    np.testing.assert_allclose(decoded.data[1].embedding, floats.data[0].embedding, atol=1e-6)
    assert np.linalg.norm(floats.data[0].embedding) == pytest.approx(1.0, abs=1e-5)
    raw = httpx.post(
        f"{url}/v1/embeddings", json={"input": "tea", "encoding_format": "base64"}
    ).json()
    vector = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(vector, floats.data[0].embedding, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
    ],
)
def test_a_bad_input_is_a_400_that_names_it(url: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{url}/v1/embeddings", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
