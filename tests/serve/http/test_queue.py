"""What clients see of the queue: classes, deadlines, and whose prefixes are reused."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from quantgate_serve.keys import KeysFile, add_key, write_keys

Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="module")
def shop(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Shop"]:
    """A server with one seat and two tenants, the books of its pages checked when it rests."""
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file, first = add_key(KeysFile(), "first")
    file, second = add_key(file, "second")
    file, operator = add_key(file, "ops", operator=True)
    write_keys(file, path)
    options = ("--kv-tokens", "2048", "--max-batch-size", "1", "--check-integrity")
    with serve("--api-keys", str(path), *options) as url:
        yield Shop(url, first, second, operator)


class Shop:
    def __init__(self, url: str, first: str, second: str, operator: str) -> None:
        self.url = url
        self.first = first
        self.second = second
        self._operator = {"authorization": f"Bearer {operator}"}

    def ask(self, key: str, **body: Any) -> httpx.Response:
        asked = {"prompt": [5, 6], "max_tokens": 4, "ignore_eos": True} | body
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}/v1/completions", json=asked, headers=headers, timeout=60)

    def total(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers=self._operator).text
        return sum(
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith(f"quantgate_{name}{{")
        )


def test_a_deadline_is_a_504_and_frees_the_seat(shop: Shop) -> None:
    before = shop.total("deadline_expired_total")
    late = shop.ask(shop.first, max_tokens=200, deadline_ms=20)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert shop.total("deadline_expired_total") == before + 1
    assert shop.ask(shop.first, deadline_ms=30_000).status_code == 200


def test_an_interactive_request_goes_before_bulk_that_runs_and_bulk_that_waits(shop: Shop) -> None:
    before = shop.total("num_preemptions_total")
    # Enough of them that some still wait when that has been noticed, up to 0.1 s late, and the
    # urgent one has come, on a machine that has much else to do.
    with ThreadPoolExecutor(20) as pool:
        bulk = [
            pool.submit(shop.ask, shop.first, priority="bulk", max_tokens=200, prompt=[n + 2] * 8)
            for n in range(20)
        ]
        while not shop.total("num_requests_waiting"):
            pass
        urgent = shop.ask(shop.first, priority="interactive")
        assert not all(future.done() for future in bulk)
        answers = [future.result() for future in bulk]
    assert urgent.status_code == 200
    assert shop.total("num_preemptions_total") > before
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [200] * 20


def test_prefixes_are_reused_inside_a_tenant_and_never_across(shop: Shop) -> None:
    prompt = list(range(20, 80))
    hits = [shop.total("prefix_cache_hits_total")]
    for key in (shop.first, shop.second, shop.first, shop.second):
        assert shop.ask(key, prompt=prompt, max_tokens=1).status_code == 200
        hits.append(shop.total("prefix_cache_hits_total"))
    reused = [after - before for before, after in itertools.pairwise(hits)]
    assert reused == [0, 0, 48, 48]
    assert shop.total("cross_tenant_hits_total") == 0
