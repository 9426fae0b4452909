"""API keys at the door: who is let in, and what each key allows."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from quantgate_serve.__main__ import main
from quantgate_serve.keys import KeysFile, add_key, read_keys, revoke_key, write_keys

Serve = Callable[..., AbstractContextManager[str]]


@dataclass(frozen=True)
class Guarded:
    """A server with keys."""

    url: str
    path: Path
    acme: str
    bulk: str
    operator: str

    def post(self, key: str | None, **body: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        asked = {"prompt": [5, 6], "max_tokens": 2} | body
        return httpx.post(f"{self.url}/v1/completions", json=asked, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def guarded(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file, acme = add_key(KeysFile(), "acme")
    file, bulk = add_key(file, "batch", classes=("bulk",))
    file, operator = add_key(file, "ops", operator=True)
    write_keys(file, path)
    with serve("--api-keys", str(path)) as url:
        yield Guarded(url, path, acme, bulk, operator)


def test_a_known_key_is_let_in(guarded: Guarded) -> None:
    assert guarded.post(guarded.acme).status_code == 200


@pytest.mark.parametrize("key", [None, "qg_00000000_wrong", "sk-other"])
def test_no_key_or_a_wrong_one_is_a_401_in_openais_form(guarded: Guarded, key: str | None) -> None:
    answer = guarded.post(key)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_openai_client_sends_its_key_and_names_the_error(guarded: Guarded) -> None:
    base_url = f"{guarded.url}/v1"
    with openai.OpenAI(base_url=base_url, api_key=guarded.acme, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
    with (
        openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="is not known"),
    ):
        client.models.list()


def test_a_key_allows_its_classes_and_no_others(guarded: Guarded) -> None:
    assert guarded.post(guarded.bulk).status_code == 200
    assert guarded.post(guarded.bulk, priority="bulk").status_code == 200
    refused = guarded.post(guarded.bulk, priority="interactive")
    assert refused.status_code == 403
    assert refused.json()["error"]["param"] == "priority"


def test_pages_about_all_tenants_are_for_operators(guarded: Guarded) -> None:
    def get(path: str, key: str | None) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.get(f"{guarded.url}{path}", headers=headers).status_code

    assert [get("/metrics", key) for key in (None, guarded.acme, guarded.operator)] == [
        401,
        403,
        200,
    ]
    assert [get(path, None) for path in ("/health", "/ready")] == [200, 200]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_are_not_let_in_without_keys(
    host: str, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(llama_folder), "--host", host]) == 2
    assert "--allow-remote-without-keys" in capsys.readouterr().err


def test_a_keys_file_that_is_missing_is_refused(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(llama_folder), "--api-keys", str(tmp_path / "none.yaml")]
    assert main(options) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_server_reads_its_keys_again_on_sighup(guarded: Guarded) -> None:
    (server,) = (one for one in psutil.Process().children() if str(guarded.path) in one.cmdline())
    before = read_keys(guarded.path)

    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code

    def replace(file: KeysFile, *, known: str) -> None:
        write_keys(file, guarded.path)
        os.kill(server.pid, signal.SIGHUP)
        deadline = time.monotonic() + 10
        while status(known) != 200:
            assert time.monotonic() < deadline, "the new key was not read"
            time.sleep(0.02)

    file, old = add_key(before, "late")
    replace(file, known=old)
    file, new = add_key(revoke_key(file, old.split("_")[1]), "late")
    replace(file, known=new)
    assert status(old) == 401
    guarded.path.write_text("tenants: [")
    os.kill(server.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert status(new) == 200
    replace(before, known=guarded.acme)
