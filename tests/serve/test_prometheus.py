"""The real Prometheus (Debian's package) scrapes a real server and evaluates the shipped rules."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

SERVE = Path(__file__).resolve().parents[2] / "serve"
RULES = SERVE / "alerts" / "quantgate.rules.yaml"
DASHBOARD = SERVE / "dashboards" / "quantgate.json"
# What a CPU does not have, and what only a promoted variant has: absent, and never 0.
# The rate of service is known once requests have waited for a while.
ABSENT_HERE = (
    *("quantgate_cuda_", "quantgate_gpu_", "quantgate_slo_baseline"),
    "quantgate_service_tokens_per_second",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="prometheus is not installed (apt-get install prometheus)",
    ),
]


def wait_for(found: Callable[[], Any], what: str, *, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < deadline, f"after {seconds:g} s there was no {what}"
        time.sleep(0.2)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def server(llama_folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    ready = tmp_path / "ready.json"
    command = [
        *(sys.executable, "-m", "quantgate_serve", "--model", str(llama_folder), "--port", "0"),
        *("--ready-file", str(ready), "--device", "cpu", "--threads", "1"),
        *("--served-model-name", "tiny", "--metrics-compat", "vllm"),
        *("--max-queued-requests", "8", "--max-batch-size", "1"),
        *("--response-cache-mib", "1", "--embedding-cache-mib", "1"),
    ]
    with running(command, tmp_path / "server.log") as child:
        wait_for(ready.exists, "listening server")
        url = json.loads(ready.read_text())["url"]
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, "warm server")
        yield child, url


@pytest.fixture
def prometheus(server: tuple[object, str], tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "prometheus.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
                "rule_files": [str(RULES)],
                "scrape_configs": [
                    {
                        "job_name": "quantgate",
                        "static_configs": [{"targets": [server[1].removeprefix("http://")]}],
                    }
                ],
            }
        )
    )
    command = [
        *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    with running(command, tmp_path / "prometheus.log"):
        wait_for(is_up, "Prometheus")
        yield url


def query(prometheus: str, expression: str) -> dict[str, float]:
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return {
        json.dumps(series["metric"], sort_keys=True): float(series["value"][1])
        for series in answer["data"]["result"]
    }


def rules(prometheus: str) -> dict[str, dict[str, Any]]:
    groups = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    return {rule["name"]: rule for group in groups for rule in group["rules"]}


def test_prometheus_reads_the_server_and_evaluates_every_rule(
    server: tuple[subprocess.Popen[bytes], str], prometheus: str
) -> None:
    child, url = server
    wait_for(lambda: query(prometheus, 'up{job="quantgate"} == 1'), "first scrape")

    def ask(number: int) -> int:
        body = {"prompt": [5 + number, 6, 7], "max_tokens": 60, "ignore_eos": True}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code

    # One seat, and five places in the queue for one class: some must be refused.
    with ThreadPoolExecutor(24) as threads:
        statuses = Counter(threads.map(ask, range(24)))
    assert set(statuses) == {200, 429}

    # The counts arrive, under our names and vLLM's, with quantiles that can be computed.
    tokens = wait_for(
        lambda: query(prometheus, f"quantgate_generation_tokens_total == {60 * statuses[200]}"),
        "token count",
    )
    assert len(tokens) == 1
    assert set(query(prometheus, "vllm:generation_tokens_total").values()) == {60 * statuses[200]}
    refusals = query(prometheus, "sum(quantgate_admission_rejections_total)")
    assert set(refusals.values()) == {statuses[429]}
    p95 = query(
        prometheus,
        "histogram_quantile(0.95, sum by (le) (quantgate_e2e_request_latency_seconds_bucket))",
    )
    assert 0 < p95["{}"] < 120

    # Every rule was evaluated without an error, and none fires on a healthy server.
    found = wait_for(
        lambda: (
            all(rule["health"] == "ok" for rule in rules(prometheus).values()) and rules(prometheus)
        ),
        "evaluation",
    )
    assert set(found) == {
        rule["alert"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
    }
    firing = {name for name, rule in found.items() if rule["state"] == "firing"}
    assert firing == set()

    # Pending until it has lasted for its `for`.
    child.kill()
    wait_for(lambda: rules(prometheus)["QuantgateDown"]["state"] in ("pending", "firing"), "alert")


def queries(panels: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The title and each expression of every panel, as Grafana would fill them in."""
    for panel in panels:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "10s")
            yield panel["title"], expression.replace("$instance", ".*").replace("$model_name", ".*")
        yield from queries(panel.get("panels", []))


def test_every_panel_of_the_dashboard_shows_something(
    server: tuple[subprocess.Popen[bytes], str], prometheus: str
) -> None:
    _, url = server
    wait_for(lambda: query(prometheus, 'up{job="quantgate"} == 1'), "first scrape")
    for number in range(20):
        body = {"prompt": [5 + number, 6, 7], "max_tokens": 8, "ignore_eos": True}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        time.sleep(0.1)
    time.sleep(1.5)  # two scrapes more
    shown = dict.fromkeys(queries(json.loads(DASHBOARD.read_text())["panels"]))
    assert len(shown) > 50
    empty = [
        (title, expression)
        for title, expression in shown
        if not query(prometheus, expression) and not any(name in expression for name in ABSENT_HERE)
    ]
    assert empty == []
