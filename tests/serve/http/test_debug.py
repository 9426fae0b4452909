"""/debug/requests: who may see it, and what the page and the JSON say."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from starlette.requests import Request as HttpRequest

from quantgate_serve.http.debug import check_loopback, lives_answer
from quantgate_serve.http.errors import ApiError
from quantgate_serve.lives import Life

LIFE = Life(
    id=7,
    arrived="2026-01-02T03:04:05.678+00:00",
    priority="normal",
    tenant="0a1b2c3d",
    prompt_tokens=12,
    cached_tokens=0,
    output_tokens=4,
    preemptions=1,
    tokenized_ms=1.0,
    queued_ms=2.0,
    admitted_ms=12.0,
    first_token_ms=32.0,
    last_token_ms=90.0,
    finished_ms=92.0,
    finish_reason="stop",
    error=None,
)


def asked_by(host: str | None, **headers: str) -> HttpRequest:
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": "/debug/requests",
        "query_string": b"",
        "client": None if host is None else (host, 50_000),
        "headers": [(name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()],
    }
    return HttpRequest(scope)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1"])
def test_this_machine_may_ask(host: str) -> None:
    check_loopback(asked_by(host))


@pytest.mark.parametrize("host", ["10.0.0.8", "192.168.1.5", "2001:db8::1", "testclient", None])
def test_nobody_else_may(host: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        check_loopback(asked_by(host))
    assert caught.value.status == 403


@pytest.mark.parametrize("header", ["x_forwarded_for", "forwarded", "x_real_ip"])
def test_a_proxy_on_this_machine_lends_nobody_its_place(header: str) -> None:
    with pytest.raises(ApiError):
        check_loopback(asked_by("127.0.0.1", **{header: "10.0.0.8"}))


def test_the_json_has_every_station_of_every_life() -> None:
    waiting = replace(LIFE, id=8, admitted_ms=None, first_token_ms=None, finished_ms=None)
    answer = lives_answer(asked_by("127.0.0.1"), [waiting, LIFE], model_name="tiny")
    body = json.loads(bytes(answer.body))
    assert body["model"] == "tiny"
    assert [request["id"] for request in body["requests"]] == [8, 7]
    assert body["requests"][0]["admitted_ms"] is None
    assert body["requests"][1]["first_token_ms"] == 32.0


def page(lives: list[Life], model_name: str = "tiny") -> str:
    asked = asked_by("127.0.0.1", accept="text/html,application/xhtml+xml")
    return bytes(lives_answer(asked, lives, model_name=model_name).body).decode()


def test_a_browser_gets_a_page_whose_bars_are_as_long_as_the_parts_took() -> None:
    text = page([LIFE])
    widths = re.findall(r'<i class=(\w+) title=\w+ style="width:([\d.]+)px">', text)
    parts = {name: round(float(width) * 92 / 240) for name, width in widths}
    assert parts == {"before": 2, "queue": 10, "prefill": 20, "decode": 60}
    assert "<td>0a1b2c3d</td>" in text


def test_a_page_shows_the_time_of_day_a_tenth_of_a_millisecond_and_failures_in_red() -> None:
    failed = replace(LIFE, last_token_ms=1234.5678, finish_reason="error", error="too late")
    fine, bad = re.findall(r"<tr.*</tr>", page([LIFE, failed]))[-2:]
    assert '<span title="2026-01-02T03:04:05.678+00:00">03:04:05.678</span>' in fine
    assert "<td>1234.6</td>" in bad
    assert (fine[:18], bad[:18]) == ("<tr><td class=bar>", "<tr class=failed><")
    assert bad.endswith("<td>too late</td></tr>")


def test_the_bar_of_a_request_under_way_goes_up_to_its_last_token() -> None:
    text = page([replace(LIFE, finished_ms=None, finish_reason=None), LIFE])
    assert re.findall(r'class=decode title=decode style="width:([\d.]+)px', text) == [
        "151.3",
        "156.5",
    ]


def test_a_page_of_nothing_is_a_page() -> None:
    assert "0 recent requests" in page([])


def test_names_cannot_write_into_the_page() -> None:
    assert "<script>" not in page([replace(LIFE, error="<script>")], model_name="<script>")
