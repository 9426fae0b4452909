"""Streaming: deltas as server-sent events, in the forms of completions and of chat."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantgate_serve.http import exchange, responses
from quantgate_serve.http.bodies import ChatBody, CompletionBody
from quantgate_serve.http.extensions import PIECES, Pieces
from quantgate_serve.request import Delta, Request
from quantgate_serve.sharing import Sharing
from quantgate_serve.vocabulary import Vocabulary

# Where the text of an event goes; never part of one.
_PLACE = "\0"


class Form(Protocol):
    """How one route words its chunks."""

    envelope: responses.Envelope

    def first(self, index: int, request: Request) -> responses.Json | None:
        """A chunk before any token, if this form has one."""

    def chunk(self, index: int, delta: Delta, start: int) -> responses.Json:
        """The chunk for output tokens from `start` on."""


class CompletionForm:
    """Chunks of /v1/completions."""

    def __init__(self, vocabulary: Vocabulary, body: CompletionBody, model_name: str) -> None:
        self._vocabulary = vocabulary
        self._body = body
        self.envelope = responses.Envelope.new(
            prefix="cmpl", kind="text_completion", model_name=model_name
        )
        # Where the next token's name begins in all of a choice's, by choice.
        self._offsets: dict[int, int] = {}

    def first(self, index: int, request: Request) -> responses.Json | None:
        if not self._body.echo:
            return None
        text = self._vocabulary.decode(request.prompt_ids)
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, delta: Delta, start: int) -> responses.Json:
        request = delta.request
        logprobs = responses.completion_logprobs(
            request,
            self._vocabulary,
            start=start,
            end=delta.num_output,
            echo=self._body.echo,
            names_ids=self._body.return_tokens_as_token_ids,
            offset=self._offsets.get(index, 0) if start else 0,
        )
        if logprobs and logprobs.get("tokens"):
            self._offsets[index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        choice: responses.Json = {
            "index": index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": responses.finish_reason(request) if delta.is_last else None,
            "stop_reason": responses.stop_reason(request) if delta.is_last else None,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = request.output_ids[start : delta.num_output]
        return choice


class ChatForm:
    """Chunks of /v1/chat/completions."""

    def __init__(self, vocabulary: Vocabulary, body: ChatBody, model_name: str) -> None:
        self._vocabulary = vocabulary
        self._body = body
        self.envelope = responses.Envelope.new(
            prefix="chatcmpl", kind="chat.completion.chunk", model_name=model_name
        )

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


class EventStream(Response):
    """A stream whose requests are aborted when it ends early, however it ends.

    What one step brought leaves in one piece.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        engine: Sharing,
        requests: Sequence[Request],
        form: Form,
        *,
        usage_choices: int | None,
    ) -> None:
        """`usage_choices` is the number of choices of each prompt, None for no usage."""
        # Not Response's own, which would announce the length of a body.
        self.status_code = 200
        self.background = None
        self._inbox = exchange.open_stream(engine, requests, self._hand_on)
        self._pieces: Pieces | None = None
        self.init_headers(responses.origin_headers(requests))
        self._engine = engine
        self._requests = requests
        self._events = Events(requests, form, usage_choices=usage_choices)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._events
        self._pieces = scope["extensions"].get(PIECES)
        try:
            # Who has left hears no more; there is nobody to tell an error either.
            with (
                contextlib.suppress(exchange.ClientGoneError),
                exchange.closing_with(scope, self._inbox),
            ):
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                piece = events.first()
                while not events.is_over:
                    if piece:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                    piece = events.of(await self._inbox.take())
                await send({"type": "http.response.body", "body": piece})
        finally:
            self._engine.abort(self._requests)

    def _hand_on(self, deltas: list[Delta]) -> bool:
        """Most tokens take this way: no task wakes for them. The end is the task's."""
        pieces = self._pieces
        if pieces is None or not pieces.is_writable or any(delta.is_last for delta in deltas):
            return False
        if piece := self._events.of(deltas):
            pieces.put(piece)
        return True


class Events:
    """The events of one answer, as bytes."""

    def __init__(
        self, requests: Sequence[Request], form: Form, *, usage_choices: int | None
    ) -> None:
        self.is_over = False
        self._requests = requests
        self._form = form
        self._usage_choices = usage_choices
        self._missing = len(requests)
        self._index_of = {request.id: index for index, request in enumerate(requests)}
        # How many tokens of each choice have been sent.
        self._sent = [0] * len(requests)
        self._frames = [_frame(form, index, request) for index, request in enumerate(requests)]

    def first(self) -> bytes:
        """What stands before any token."""
        chunks = [self._form.first(index, request) for index, request in enumerate(self._requests)]
        return b"".join(_event(self._form.envelope.around([chunk])) for chunk in chunks if chunk)

    def of(self, deltas: Sequence[Delta]) -> bytes:
        """What `deltas` are to the client; with the last of all the end, and `is_over`."""
        if len(deltas) == 1 and not deltas[0].is_last and deltas[0].request.error is None:
            return self._chunk(deltas[0])
        return b"".join(self._of(deltas))

    def _of(self, deltas: Sequence[Delta]) -> Iterator[bytes]:
        for delta in deltas:
            if delta.request.error is not None:
                yield _event(exchange.api_error(delta.request.error).body())
                self.is_over = True
                break
            yield self._chunk(delta)
            self._missing -= delta.is_last
        if not self._missing and not self.is_over:
            self.is_over = True
            if self._usage_choices is not None:
                event = self._form.envelope.around([])
                event["usage"] = responses.usage(self._requests, num_choices=self._usage_choices)
                yield _event(event)
        if self.is_over:
            yield b"data: [DONE]\n\n"

    def _chunk(self, delta: Delta) -> bytes:
        """Nothing while there is nothing to say: half a character, or what may be a stop string."""
        index = self._index_of[delta.request.id]
        frame, start = self._frames[index], self._sent[index]
        self._sent[index] = delta.num_output
        if frame is not None and not delta.is_last:
            return frame.around(delta.text) if delta.text else b""
        choice = self._form.chunk(index, delta, start)
        if not (delta.text or delta.is_last or choice["logprobs"] or choice.get("token_ids")):
            return b""
        event = self._form.envelope.around([choice])
        if delta.is_last:
            event["timings"] = responses.timings([delta.request])
        return _event(event)


@dataclass(frozen=True, slots=True)
class _Frame:
    """An event but for its text: of a hundred tokens ninety-nine differ in nothing else."""

    before: bytes
    after: bytes

    def around(self, text: str) -> bytes:
        return self.before + encode_basestring_ascii(text).encode() + self.after


def _frame(form: Form, index: int, request: Request) -> _Frame | None:
    """None where a chunk has more to say than its text."""
    choice = form.chunk(index, Delta(request, 0, _PLACE, is_last=False), 0)
    if choice["logprobs"] is not None or "token_ids" in choice:
        return None
    # The model's name stands before the text, and after it nothing that a client or user wrote.
    before, _, after = _event(form.envelope.around([choice])).rpartition(
        json.dumps(_PLACE).encode()
    )
    return _Frame(before, after)


def _event(value: responses.Json | dict[str, dict[str, str | None]]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
