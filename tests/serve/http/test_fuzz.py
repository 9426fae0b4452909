"""Whatever is sent, the server answers in its form, says 4xx about what is wrong, and lives on.

After each test the same server must answer plain requests, hold no page for anybody, and have
neither lost an engine nor failed a step. It checks the books of its pages whenever it is idle.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantgate_serve.http import answers
from quantgate_serve.structured import is_available

Serve = Callable[..., AbstractContextManager[str]]
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
PLAIN: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": [5, 6], "max_tokens": 1},
    CHAT: {"messages": [{"role": "user", "content": "tea"}], "max_tokens": 1},
    EMBEDDINGS: {"input": [5, 6]},
}
SHARED = {"model": "tiny", "priority": "bulk", "deadline_ms": 60_000, "x_unknown": {"a": [1]}}
CHOICES = SHARED | {
    "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3, "stop": ["zz"], "n": 2, "stream": True,
    "stream_options": {"include_usage": True}, "ignore_eos": False, "return_token_ids": True,
    "logprob_token_ids": [3, 4], "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {},
    "repetition_penalty": 1, "min_p": 0,
    "response_format": {
        "type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}},
    },
}  # fmt: skip
# Every field, at a value that is accepted: what is put in its place is all that is wrong.
FULL: dict[str, dict[str, Any]] = {
    COMPLETIONS: PLAIN[COMPLETIONS] | CHOICES | {
        "logprobs": 2, "echo": True, "return_tokens_as_token_ids": True, "best_of": 2,
        "suffix": "", "add_special_tokens": True,
    },
    CHAT: CHOICES | {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "brief"}]},
            {"role": "user", "content": "tea", "name": "ann"},
        ],
        "max_tokens": 1, "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 2,
        "tools": [],
    },
    EMBEDDINGS: PLAIN[EMBEDDINGS] | SHARED | {"encoding_format": "base64", "dimensions": 64},
}  # fmt: skip

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 1 << 31, 1 << 63, (1 << 63) - 1, 1 << 64, 10**400])
    | st.sampled_from([0.5, 1e308, -0.0, 5e-324, 1e-40, float("nan"), float("inf")])
    | st.floats()
    | TEXTS
    | st.sampled_from(["", "\0", "\ufffd", "\U0001f600", "json_object", "json_schema", "text"])
)
KEYS = st.sampled_from(["type", "role", "content", "text", "json_schema", "schema", "a"]) | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
SCHEMAS = st.recursive(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["integer", "number", "string", "boolean", "null", "object"]),
            "enum": st.lists(SCALARS, max_size=3),
            "const": SCALARS,
            "pattern": st.sampled_from(["a+", "(a|b)*a(a|b){30}", "(", "(?=a)", ".{1000000}"]),
            "minLength": st.integers(-1, 1 << 40),
            "maxLength": st.integers(-1, 1 << 40),
            "minimum": st.floats(),
            "maximum": st.integers(),
            "multipleOf": st.sampled_from([0, 1, -1, 0.1, 999_999_937, 1e-300]),
            "format": st.sampled_from(["date-time", "email", "x"]),
            "$ref": st.sampled_from(["#", "#/$defs/a", "http://127.0.0.1:1/a", ""]),
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            "required": st.lists(st.sampled_from("abcd"), max_size=3),
            "additionalProperties": inner | st.booleans(),
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$"]), inner, max_size=2),
            "items": inner,
            "minItems": st.integers(-1, 1 << 20),
            "anyOf": st.lists(inner, max_size=3),
            "allOf": st.lists(inner, max_size=3),
            "oneOf": st.lists(inner, max_size=3),
            "not": inner,
            "$defs": st.fixed_dictionaries({"a": inner}),
        },
    ),
    max_leaves=6,
)
FUZZ = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def client(serve: Serve) -> Iterator[httpx.Client]:
    options = ("--kv-tokens", "4096", "--check-integrity", "--max-body-bytes", "300000")
    caches = ("--response-cache-mib", "1", "--embedding-cache-mib", "1")
    with serve(*options, *caches) as url, httpx.Client(base_url=url, timeout=60) as made:
        yield made


@pytest.fixture
def http(client: httpx.Client) -> Iterator[httpx.Client]:
    yield client
    for path, body in PLAIN.items():
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
    until = time.monotonic() + 10
    while held := metrics(client, "num_requests_running", "kv_cache_usage_perc"):
        assert time.monotonic() < until, f"nobody asks any more, and the engine holds {held}"
        time.sleep(0.05)
    assert metrics(client, "engine_restarts_total", "step_errors_total", "oom_total") == {}


def metrics(client: httpx.Client, *names: str) -> dict[str, float]:
    """Those of `names` that are not 0."""
    found = {}
    lines = client.get("/metrics").text.splitlines()
    for name in names:
        values = [line.split()[-1] for line in lines if line.startswith(f"quantgate_{name}{{")]
        assert values, f"there is no {name}"
        if total := sum(map(float, values)):
            found[name] = total
    return found


def check(answer: httpx.Response) -> None:
    """An answer, or a refusal of what was sent: nothing here is the server's own fault."""
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        error = answers.ErrorAnswer.model_validate_json(answer.content).error
        assert len(error.message) < 2000
    elif answer.headers["content-type"].startswith("text/event-stream"):
        *events, end, rest = answer.text.split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        for event in events:
            error = json.loads(event.removeprefix("data: ")).get("error")
            assert error is None or error["type"] == "invalid_request_error", error
    else:
        json.loads(answer.content, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def post(http: httpx.Client, path: str, body: Any) -> None:
    # As NaN, Infinity and half surrogates too: json.dumps writes what json.loads would read.
    check(http.post(path, content=json.dumps(body).encode()))


def places(value: Any, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside `value`."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, one in inner:
        yield (*so_far, key)
        yield from places(one, (*so_far, key))


@pytest.mark.parametrize("path", sorted(FULL))
def test_with_every_field_at_a_good_value_it_is_served(http: httpx.Client, path: str) -> None:
    body = FULL[path]
    if "response_format" in body and not is_available():
        body = {name: value for name, value in body.items() if name != "response_format"}
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    check(answer)


@FUZZ
@given(
    place=st.sampled_from(
        [(path, *place) for path, body in FULL.items() for place in places(body)]
    ),
    value=VALUES,
)
def test_any_value_in_any_one_place_is_answered(
    http: httpx.Client, place: tuple[Any, ...], value: Any
) -> None:
    path, *way, last = place
    body = deepcopy(FULL[path])
    inner = body
    for key in way:
        inner = inner[key]
    inner[last] = value
    post(http, path, body)


@FUZZ
@given(
    path=st.sampled_from(sorted(FULL)),
    changes=st.dictionaries(st.sampled_from(sorted(set().union(*FULL.values()))) | KEYS, VALUES),
)
def test_any_values_in_many_fields_are_answered(
    http: httpx.Client, path: str, changes: dict[str, Any]
) -> None:
    post(http, path, PLAIN[path] | changes)


@pytest.mark.skipif(not is_available(), reason="llguidance is not installed")
@FUZZ
@given(schema=SCHEMAS)
def test_any_schema_is_followed_or_refused(http: httpx.Client, schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    post(http, COMPLETIONS, {"prompt": [5], "max_tokens": 6, "response_format": wanted})


@FUZZ
@given(
    path=st.sampled_from(sorted(PLAIN)),
    at=st.integers(0),
    bytes_=st.binary(max_size=3),
    kind=st.sampled_from(["application/json", "text/plain", "multipart/form-data", "\xff", ""]),
    encoding=st.sampled_from(["identity", "gzip", "x"]),
)
def test_a_damaged_body_is_answered(
    http: httpx.Client, path: str, at: int, bytes_: bytes, kind: str, encoding: str
) -> None:
    content = json.dumps(PLAIN[path]).encode()
    at %= len(content)
    content = content[:at] + bytes_ + content[at + 1 :]
    headers = {"content-type": kind.encode("latin-1"), "content-encoding": encoding.encode()}
    check(http.post(path, content=content, headers=headers))


@FUZZ
@given(path=st.sampled_from(sorted(PLAIN)), content=st.binary(max_size=200))
def test_any_bytes_are_answered(http: httpx.Client, path: str, content: bytes) -> None:
    answer = http.post(path, content=content)
    assert answer.status_code == 400
    check(answer)


@FUZZ
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "X"]),
    path=st.sampled_from([*PLAIN, "/v1/models", "/v1/models/x", "/v1", "/", "/%00", "/health/"]),
    name=st.sampled_from(["x-request-id", "x-request-deadline-ms", "authorization", "accept"]),
    value=st.binary(max_size=30).map(lambda raw: bytes(b for b in raw if b >= 32 and b != 127)),
)
def test_any_method_path_and_header_is_answered(
    http: httpx.Client, method: str, path: str, name: str, value: bytes
) -> None:
    answer = http.request(method, path, headers={name: value.strip()})
    assert answer.status_code < 500, answer.text
    # A method that nobody knows is no HTTP to the parser: no request, which would have an id.
    assert answer.headers["x-request-id"] if method != "X" else answer.status_code == 400
    if answer.status_code >= 400 and method != "HEAD":
        answers.ErrorAnswer.model_validate_json(answer.content)


def body(field: bytes) -> bytes:
    return b'{"prompt": [5, 6], "max_tokens": 1, ' + field + b"}"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        pytest.param(b"", 400, "invalid_json", id="nothing"),
        pytest.param(b"null", 400, "invalid_json", id="null"),
        pytest.param(b"[]", 400, "invalid_json", id="a list"),
        pytest.param(b'"a"', 400, "invalid_json", id="a string"),
        pytest.param(
            b"\xef\xbb\xbf" + body(b'"a": 1'), 400, "invalid_json", id="a byte order mark"
        ),
        pytest.param(body(b'"a": 1').decode().encode("utf-16"), 400, "invalid_json", id="UTF-16"),
        pytest.param(body(b'"temperature": NaN'), 400, "invalid_json", id="NaN"),
        pytest.param(body(b'"temperature": -Infinity'), 400, "invalid_json", id="-Infinity"),
        pytest.param(body(b'"temperature": 1e400'), 400, "invalid_value", id="1e400"),
        pytest.param(body(b'"max_tokens": 1e400'), 400, "invalid_value", id="1e400 tokens"),
        pytest.param(body(b'"a": 1e400'), 200, None, id="1e400 in an unknown field"),
        pytest.param(body(b'"seed": ' + b"9" * 5000), 400, "invalid_json", id="5000 digits"),
        pytest.param(body(b'"seed": ' + b"9" * 4000), 400, "invalid_value", id="4000 digits"),
        pytest.param(body(b'"user": "\\ud800"'), 400, "invalid_json", id="half a surrogate pair"),
        pytest.param(body(b'"user": "\xed\xa0\x80"'), 400, "invalid_json", id="the same in UTF-8"),
        pytest.param(body(b'"user": "\\ud83d\\ude00"'), 200, None, id="a whole pair"),
        pytest.param(body(b'"a": ' + b"[" * 99_000 + b"]" * 99_000), 400, "invalid_json", id="[[["),
        pytest.param(body(b'"a": ' + b'{"a":' * 40_000), 400, "invalid_json", id='{"a":{"a":'),
        pytest.param(body(b'"n": 1, "n": 1, "a": 1'), 200, None, id="a key twice"),
        pytest.param(body(b'"\\u0000": 1, "": 1, "__class__": 1'), 200, None, id="odd keys"),
        pytest.param(body(b'"' + b"k" * 200_000 + b'": 1'), 200, None, id="a long key"),
        pytest.param(
            body(b", ".join(b'"k%d": %d' % (k, k) for k in range(15_000))),
            200,
            None,
            id="many keys",
        ),
        pytest.param(
            body(b'"model": "' + b"m" * 250_000 + b'"'), 404, "model_not_found", id="model"
        ),
        pytest.param(body(b'"stop": "' + b"s" * 250_000 + b'"'), 400, "invalid_value", id="stop"),
        pytest.param(
            body(b'"stop": [' + b"1, " * 90_000 + b"1]"), 400, "invalid_value", id="stop strings"
        ),
        pytest.param(
            b'{"prompt": "' + b"a" * 280_000 + b'"}', 400, "context_length_exceeded", id="prompt"
        ),
        pytest.param(
            b'{"prompt": [' + b"[], " * 70_000 + b"[]]}", 400, "invalid_value", id="empty prompts"
        ),
        pytest.param(body(b'"a": 1' + b" " * 300_000), 413, "request_too_large", id="too much"),
    ],
)
def test_extremes_have_their_answers(
    http: httpx.Client, content: bytes, status: int, code: str | None
) -> None:
    answer = http.post(COMPLETIONS, content=content)
    assert answer.status_code == status, answer.text[:500]
    check(answer)
    assert code is None or answer.json()["error"]["code"] == code


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-40, 1e-8])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_temperature_near_zero_draws_the_best_token(
    http: httpx.Client, temperature: float, top_k: int
) -> None:
    asked = PLAIN[COMPLETIONS] | {"max_tokens": 6, "ignore_eos": True, "return_token_ids": True}

    def tokens(**options: Any) -> Any:
        answer = http.post(COMPLETIONS, json=asked | options).json()
        return answer["choices"][0]["token_ids"]

    assert tokens(temperature=temperature, top_k=top_k) == tokens(temperature=0)


# More than llguidance follows at once; it shows only while it is followed.
MANY_BRANCHES = {
    "anyOf": [
        {"type": "object", "properties": {f"k{n}": {"type": "string", "pattern": f".*x{{{n}}}.*"}}}
        for n in range(400)
    ]
}


@pytest.mark.skipif(not is_available(), reason="llguidance is not installed")
def test_a_grammar_that_turns_out_too_complex_is_the_client_s_fault(http: httpx.Client) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": MANY_BRANCHES}}
    asked = PLAIN[COMPLETIONS] | {"max_tokens": 8, "response_format": wanted}
    answer = http.post(COMPLETIONS, json=asked)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "grammar_too_complex"
    check(answer)
    check(http.post(COMPLETIONS, json=asked | {"stream": True}))
