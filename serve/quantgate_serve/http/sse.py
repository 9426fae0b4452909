"""Streaming: deltas as server-sent events, in the forms of completions and of chat."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from quantgate_serve.http import exchange, responses
from quantgate_serve.http.protocol import ChatBody, CompletionBody
from quantgate_serve.request import Delta, Request
from quantgate_serve.sharing import Sharing
from quantgate_serve.vocabulary import Vocabulary


class Form(Protocol):
    """How one route words its chunks."""

    def first(self, index: int, request: Request) -> responses.Json | None:
        """A chunk before any token, if this form has one."""

    def chunk(self, index: int, delta: Delta, start: int) -> responses.Json:
        """The chunk for output tokens from `start` on."""

    def envelope(self, choices: list[responses.Json]) -> responses.Json:
        """The event around `choices`."""


class CompletionForm:
    """Chunks of /v1/completions."""

    def __init__(self, vocabulary: Vocabulary, body: CompletionBody, model_name: str) -> None:
        self._vocabulary = vocabulary
        self._body = body
        self._model_name = model_name
        self._id = responses.new_id("cmpl")
        self._created_s = responses.now_s()

    def first(self, index: int, request: Request) -> responses.Json | None:
        if not self._body.echo:
            return None
        text = self._vocabulary.decode(request.prompt_ids)
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, delta: Delta, start: int) -> responses.Json:
        request = delta.request
        choice: responses.Json = {
            "index": index,
            "text": delta.text,
            "logprobs": responses.completion_logprobs(
                request,
                self._vocabulary,
                start=start,
                end=delta.num_output,
                echo=self._body.echo,
                names_ids=self._body.return_tokens_as_token_ids,
            ),
            "finish_reason": responses.finish_reason(request) if delta.is_last else None,
            "stop_reason": responses.stop_reason(request) if delta.is_last else None,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = request.output_ids[start : delta.num_output]
        return choice

    def envelope(self, choices: list[responses.Json]) -> responses.Json:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created_s,
            "model": self._model_name,
            "choices": choices,
        }


class ChatForm:
    """Chunks of /v1/chat/completions."""

    def __init__(self, vocabulary: Vocabulary, body: ChatBody, model_name: str) -> None:
        self._vocabulary = vocabulary
        self._body = body
        self._model_name = model_name
        self._id = responses.new_id("chatcmpl")
        self._created_s = responses.now_s()

    def first(self, index: int, request: Request) -> responses.Json | None:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def chunk(self, index: int, delta: Delta, start: int) -> responses.Json:
        request = delta.request
        choice: responses.Json = {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": responses.chat_logprobs(
                request, self._vocabulary, start=start, end=delta.num_output
            ),
            "finish_reason": responses.finish_reason(request) if delta.is_last else None,
            "stop_reason": responses.stop_reason(request) if delta.is_last else None,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = request.output_ids[start : delta.num_output]
        return choice

    def envelope(self, choices: list[responses.Json]) -> responses.Json:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created_s,
            "model": self._model_name,
            "choices": choices,
        }


class EventStream(StreamingResponse):
    """A stream whose requests are aborted when it ends early, however it ends."""

    def __init__(
        self,
        engine: Sharing,
        requests: Sequence[Request],
        form: Form,
        *,
        usage_choices: int | None,
    ) -> None:
        """`usage_choices` is the number of choices of each prompt, None for no usage."""
        deltas = exchange.open_stream(engine, requests)
        events = _events(deltas, requests, form, usage_choices=usage_choices)
        super().__init__(
            events, media_type="text/event-stream", headers=responses.origin_headers(requests)
        )
        self._engine = engine
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine.abort(self._requests)


async def _events(
    deltas: AsyncIterator[Delta],
    requests: Sequence[Request],
    form: Form,
    *,
    usage_choices: int | None,
) -> AsyncIterator[bytes]:
    index_of = {request.id: index for index, request in enumerate(requests)}
    sent = [0] * len(requests)
    for index, request in enumerate(requests):
        first = form.first(index, request)
        if first is not None:
            yield _event(form.envelope([first]))
    async for delta in deltas:
        if delta.request.error is not None:
            yield _event(exchange.api_error(delta.request.error).body())
            break
        index = index_of[delta.request.id]
        choice = form.chunk(index, delta, sent[index])
        sent[index] = delta.num_output
        # Nothing to say yet: an incomplete character, or what may become a stop string.
        if not (delta.text or delta.is_last or choice["logprobs"] or choice.get("token_ids")):
            continue
        event = form.envelope([choice])
        if delta.is_last:
            event["timings"] = responses.timings([delta.request])
        yield _event(event)
    else:
        if usage_choices is not None:
            event = form.envelope([])
            event["usage"] = responses.usage(requests, num_choices=usage_choices)
            yield _event(event)
    yield b"data: [DONE]\n\n"


def _event(value: responses.Json | dict[str, dict[str, str | None]]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
