"""Which path takes which methods, as a client on a real connection sees it."""

import json
from http.client import HTTPConnection

import httpx
import pytest


@pytest.mark.parametrize("method", ["PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE", "PROPFIND"])
@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/completions", {"POST"}),
        ("/v1/embeddings", {"POST"}),
        ("/admin/reload", {"POST"}),
        ("/v1/models", {"GET", "HEAD"}),
        ("/v1/models/tiny", {"GET", "HEAD"}),
        ("/metrics", {"GET", "HEAD"}),
    ],
)
def test_another_method_than_a_path_takes_is_a_405_that_names_those_it_takes(
    method: str, path: str, allowed: set[str], shared_url: str
) -> None:
    answer = httpx.request(method, f"{shared_url}{path}")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == allowed
    error = answer.json()["error"]
    assert error["code"] == "http_error"
    assert (
        error["message"] == f"{path} does not take {method}, only {' and '.join(sorted(allowed))}."
    )


def test_an_unknown_path_is_a_404_whatever_the_method(shared_url: str) -> None:
    for method in ("GET", "POST", "PATCH"):
        assert httpx.request(method, f"{shared_url}/v1/nothing").status_code == 404


@pytest.mark.parametrize("method", ["BREW", "get", "GETS"])
def test_a_method_that_the_parser_does_not_know_is_a_400_whatever_the_path(
    method: str, shared_url: str
) -> None:
    # httpx would write it in capitals.
    connection = HTTPConnection(shared_url.removeprefix("http://"), timeout=10)
    connection.request(method, "/v1/models")
    answer = connection.getresponse()
    error = json.load(answer)["error"]
    connection.close()
    assert (answer.status, error["code"]) == (400, "invalid_http")
    assert "method" in error["message"]
