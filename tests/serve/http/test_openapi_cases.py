"""schemathesis against the server's own description: thousands of cases, none ends in a 5xx.

`make fuzz` runs this. schemathesis has an environment of its own (.venv-fuzz), for it wants other
versions of what the tests use. What it sent and got is read from its record (HAR) and judged here,
beside its own checks.
"""

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from quantgate_serve.http import answers

Serve = Callable[..., AbstractContextManager[str]]
ROOT = Path(__file__).resolve().parents[3]
COMMAND = shutil.which("schemathesis", path=ROOT / ".venv-fuzz" / "bin") or shutil.which(
    "schemathesis"
)
LEAST_CASES = 5000
# Per operation; those without a body run out of different cases sooner.
MAX_EXAMPLES = 1500
SEED = 3
TIMEOUT_S = 1800
# A request may ask for an answer within a millisecond, and 504 says that it did not get one. A body
# that breaks the schema by its size is a 413.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]
[checks.negative_data_rejection]
expected-statuses = ["4xx", 504]
"""
# It asks that whatever fits the schema is accepted. Rules between fields (top_logprobs needs
# logprobs), the context's length and the vocabulary are not in the schema.
LEFT_OUT = "positive_data_acceptance"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMMAND is None, reason="schemathesis is not installed: make fuzz"),
]


@pytest.fixture(scope="module")
def exchanges(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What schemathesis sent and got; its own checks have passed."""
    work = tmp_path_factory.mktemp("schemathesis")
    (work / "schemathesis.toml").write_text(CONFIG)
    with serve("--kv-tokens", "4096", "--check-integrity") as url:
        done = subprocess.run(
            [
                *(str(COMMAND), "run", f"{url}/openapi.json", "--checks", "all"),
                *("--exclude-checks", LEFT_OUT),
                *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-shrink"),
                *("--max-examples", str(MAX_EXAMPLES), "--seed", str(SEED), "--no-color"),
                *("--report", "har", "--report-har-path", str(work / "cases.har")),
                *("--request-timeout", "60", "--output-truncate", "true"),
            ],
            cwd=work,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
        assert httpx.get(f"{url}/ready").status_code == 200
    entries: list[dict[str, Any]] = json.loads((work / "cases.har").read_text())["log"]["entries"]
    return entries


def test_no_case_of_thousands_is_the_server_s_fault(exchanges: list[dict[str, Any]]) -> None:
    assert len(exchanges) >= LEAST_CASES
    statuses = Counter(entry["response"]["status"] for entry in exchanges)
    assert statuses[200] > 0
    for entry in exchanges:
        if entry["response"]["status"] >= 500:
            assert entry["response"]["status"] == 504, entry
            assert has_deadline(entry["request"]), entry
    print(f"{len(exchanges)} cases: {dict(sorted(statuses.items()))}")


def has_deadline(request: dict[str, Any]) -> bool:
    names = {header["name"].lower() for header in request["headers"]}
    return "x-request-deadline-ms" in names or '"deadline_ms"' in request.get("postData", {}).get(
        "text", ""
    )


def test_every_error_has_openais_form(exchanges: list[dict[str, Any]]) -> None:
    for entry in exchanges:
        request, response = entry["request"], entry["response"]
        is_api = urlsplit(request["url"]).path.startswith("/v1/")
        if is_api and response["status"] >= 400 and request["method"] != "HEAD":
            answers.ErrorAnswer.model_validate_json(response["content"]["text"])
