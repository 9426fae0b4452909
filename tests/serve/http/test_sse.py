"""Events that are put together from bytes say what the whole form would have said."""

import json
from typing import Any

import pytest

from quantgate_serve.http.bodies import ChatBody, CompletionBody
from quantgate_serve.http.sse import ChatForm, CompletionForm, Events, Form
from quantgate_serve.request import Delta, FinishReason, Request, RequestError, SamplingParams
from quantgate_serve.vocabulary import Vocabulary

# What JSON must escape, what it need not, and what a careless search for the place would find.
TEXTS = ["tea", ' "', "\\", "\n\x00", "€", "🙂", "\u2028", '"\\u0000"']
NAMES = ["tiny", 'a "name"', "\x00", '"\\u0000"']


def form_of(kind: str, tokenizer: Any, name: str, **fields: Any) -> Form:
    vocabulary = Vocabulary(tokenizer)
    if kind == "chat":
        messages = [{"role": "user", "content": "tea"}]
        return ChatForm(vocabulary, ChatBody(messages=messages, **fields), name)
    return CompletionForm(vocabulary, CompletionBody(prompt="tea", **fields), name)


def events_of(piece: bytes) -> list[dict[str, Any]]:
    lines = [line for line in piece.decode().split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines if "[DONE]" not in line]


def grow(request: Request, text: str = "", *, is_last: bool = False) -> Delta:
    request.token_ids.append(7)
    if is_last:
        request.finish_reason = FinishReason.LENGTH
    return Delta(request, request.num_output, text, is_last)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_an_event_of_text_alone_is_the_one_that_the_form_makes(
    tokenizer: Any, kind: str, name: str
) -> None:
    form = form_of(kind, tokenizer, name)
    request = Request([5], SamplingParams(max_tokens=9))
    events = Events([request], form, usage_choices=None)
    for text in TEXTS:
        delta = grow(request, text)
        whole = form.envelope.around([form.chunk(0, delta, request.num_output - 1)])
        assert events_of(events.of([delta])) == [whole]


def test_what_several_choices_got_leaves_in_order_in_one_piece(tokenizer: Any) -> None:
    requests = [Request([5], SamplingParams()) for _ in range(2)]
    events = Events(requests, form_of("completion", tokenizer, "tiny"), usage_choices=None)
    piece = events.of([grow(requests[1], "b"), grow(requests[0], "a"), grow(requests[1], "c")])
    choices = [event["choices"][0] for event in events_of(piece)]
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        *((1, "b"), (0, "a"), (1, "c"))
    ]


def test_a_token_without_certain_text_has_no_event(tokenizer: Any) -> None:
    request = Request([5], SamplingParams())
    events = Events([request], form_of("chat", tokenizer, "tiny"), usage_choices=None)
    assert events.of([grow(request)]) == b""


def test_token_ids_are_told_even_without_text(tokenizer: Any) -> None:
    request = Request([5], SamplingParams())
    form = form_of("completion", tokenizer, "tiny", return_token_ids=True)
    events = Events([request], form, usage_choices=None)
    found = [events_of(events.of([grow(request, text)])) for text in ("", "tea")]
    assert [event["choices"][0]["token_ids"] for (event,) in found] == [[7], [7]]


def test_the_end_brings_the_reason_the_times_the_usage_and_done(tokenizer: Any) -> None:
    request = Request([5], SamplingParams())
    events = Events([request], form_of("completion", tokenizer, "tiny"), usage_choices=1)
    assert not events.is_over
    piece = events.of([grow(request, "a"), grow(request, "b", is_last=True)])
    first, last, usage = events_of(piece)
    assert first["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["finish_reason"] == "length"
    assert "timings" in last
    assert usage["usage"]["completion_tokens"] == 2
    assert piece.endswith(b"data: [DONE]\n\n")
    assert events.is_over


def test_an_error_ends_the_stream_of_all_choices(tokenizer: Any) -> None:
    requests = [Request([5], SamplingParams()) for _ in range(2)]
    events = Events(requests, form_of("completion", tokenizer, "tiny"), usage_choices=1)
    requests[0].error = RequestError("gone.", "engine_failed")
    piece = events.of([grow(requests[0], is_last=True), grow(requests[1], "a")])
    assert [event["error"]["code"] for event in events_of(piece)] == ["engine_failed"]
    assert piece.endswith(b"data: [DONE]\n\n")
    assert events.is_over
