"""What a client may send, and the words of a refusal."""

import json
from typing import Any

import pytest

from quantgate_serve.http.bodies import ChatBody, CompletionBody
from quantgate_serve.http.errors import ApiError
from quantgate_serve.http.protocol import (
    MAX_LOGPROB_VALUES,
    check_logprobs,
    parse_body,
    plain_messages,
    sampling_params,
)


def completion(**values: Any) -> CompletionBody:
    return parse_body(CompletionBody, json.dumps({"prompt": "a"} | values).encode())


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 1.5}, "n"),
        ({"top_k": 1 << 63}, "top_k"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": -(1 << 63) - 1}, "seed"),
        ({"stop": ["a", 3]}, "stop.1"),
        ({"stop": "x" * 257}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"priority": "urgent"}, "priority"),
        ({"deadline_ms": 0.99}, "deadline_ms"),
        ({"logprob_token_ids": [1] * 1025}, "logprob_token_ids"),
    ],
)
def test_a_bad_value_is_a_400_that_names_it(values: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**values)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"a"',
        b"\xff",
        b"[" * 100_000,
        b'{"a": ' * 5_000,
        b'{"prompt": NaN}',
        b'{"prompt": -Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"seed": ' + b"9" * 5_000 + b"}",
        '{"prompt": "a"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"prompt": "a"}',
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(raw: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not"):
        parse_body(CompletionBody, raw)


def test_null_stands_for_the_default() -> None:
    assert completion(**dict.fromkeys(["temperature", "n", "stop", "max_tokens"])) == completion()


def test_the_largest_values_are_taken() -> None:
    largest = (1 << 63) - 1
    body = completion(top_k=largest, seed=largest, n=64, logprobs=20, stop=["x" * 256] * 16)
    assert sampling_params(body, max_tokens=1, choice=63, base_seed=largest).seed == largest + 63


def test_an_integer_may_be_written_as_a_float() -> None:
    assert completion(n=2.0, max_tokens=3.0).max_tokens == 3


def test_a_missing_prompt_is_a_400() -> None:
    with pytest.raises(ApiError, match="prompt: Field required"):
        parse_body(CompletionBody, b"{}")


def test_neutral_values_of_missing_features_are_accepted() -> None:
    body = completion(frequency_penalty=0, best_of=1, logit_bias={}, user="me", unknown=1)
    assert body.n == 1


def test_each_choice_has_its_own_seed() -> None:
    body = completion(seed=7, n=2, echo=True, logprobs=1, stop="x")
    first, second = (
        sampling_params(body, max_tokens=4, choice=choice, base_seed=7) for choice in (0, 1)
    )
    assert (first.seed, second.seed) == (7, 8)
    assert first.prompt_logprobs
    assert first.stop == ("x",)


def test_chat_top_logprobs_need_logprobs() -> None:
    raw = json.dumps({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}).encode()
    with pytest.raises(ApiError, match="needs logprobs"):
        parse_body(ChatBody, raw)


def chat(*messages: Any) -> ChatBody:
    return parse_body(ChatBody, json.dumps({"messages": messages}).encode())


def test_content_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat({"role": "user", "content": parts, "name": "me"})
    assert plain_messages(body.messages) == [{"role": "user", "content": "ab", "name": "me"}]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"content": "a"}, "messages.0.role"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages.0.content.0.type",
        ),
        ({"role": "user", "content": ["a"]}, "messages.0.content.0"),
        ({"role": 1, "content": "a"}, "messages.0.role"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ("hello", "messages.0"),
    ],
)
def test_a_message_without_role_and_text_is_a_400(message: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(message)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_log_probabilities_are_counted_over_choices_positions_and_ids() -> None:
    scored = completion(logprobs=1, echo=True, max_tokens=0)
    check_logprobs(scored, num_prompts=64, scored=MAX_LOGPROB_VALUES // 2, max_tokens=0)
    with pytest.raises(ApiError, match="2 at each of 262145 positions are 524290") as caught:
        check_logprobs(scored, num_prompts=64, scored=MAX_LOGPROB_VALUES // 2 + 1, max_tokens=0)
    assert (caught.value.status, caught.value.param) == (400, "logprobs")

    by_id = completion(n=4, logprob_token_ids=list(range(1024)))
    check_logprobs(by_id, num_prompts=1, scored=0, max_tokens=128)
    with pytest.raises(ApiError) as caught:
        check_logprobs(by_id, num_prompts=1, scored=0, max_tokens=129)
    assert caught.value.param == "logprob_token_ids"

    without = completion(n=64)
    check_logprobs(without, num_prompts=2048, scored=0, max_tokens=1 << 20)


def test_parts_of_contents_are_bounded_over_all_messages() -> None:
    part, limit = {"type": "text", "text": "a"}, 2048
    chat({"role": "user", "content": [part] * limit})
    half = {"role": "user", "content": [part] * (limit // 2)}
    chat(half, half)
    with pytest.raises(ApiError, match="2049 parts of contents, the limit is 2048"):
        chat(half, half, {"role": "user", "content": [part]})


def test_a_message_about_a_long_value_is_short() -> None:
    with pytest.raises(ApiError) as caught:
        completion(logit_bias={"k" * 100_000: "x"})
    assert len(caught.value.message) <= 1000
    assert caught.value.param is not None
    assert len(caught.value.param) <= 200
