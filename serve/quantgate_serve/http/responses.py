"""Answers in OpenAI's form, built from finished or growing requests as plain dictionaries."""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from starlette.responses import JSONResponse

from quantgate_serve.request import FinishReason, Origin, Request, TokenLogprob
from quantgate_serve.vocabulary import Vocabulary

Json = dict[str, Any]
# As Starlette's own answers are written, without making an encoder for each.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class _AnswerResponse(JSONResponse):
    def render(self, content: Any) -> bytes:
        return _encode(content).encode()


@dataclass(slots=True)
class Envelope:
    """What stands around the choices of a whole answer, and of each event of a stream."""

    id: str
    kind: str
    created_s: int
    model_name: str

    @classmethod
    def new(cls, *, prefix: str, kind: str, model_name: str) -> Self:
        """One for an answer that begins now, its id behind `prefix`."""
        # Unique, and no secret: os.urandom would give up the GIL for each request.
        id = f"{prefix}-{random.getrandbits(96):024x}"
        return cls(id, kind, now_s(), model_name)

    def around(self, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created_s,
            "model": self.model_name,
            "choices": choices,
        }


def now_s() -> int:
    return int(time.time())


def output_text(request: Request, vocabulary: Vocabulary) -> str:
    """The text of a finished request, without the end token and the stop string."""
    if request.text is not None:
        return request.text.text
    ids = request.output_ids
    return vocabulary.decode(ids[:-1] if request.ended_by_eos else ids)


def finish_reason(request: Request) -> str | None:
    reason = request.finish_reason
    return None if reason is None or reason is FinishReason.ABORT else reason.value


def stop_reason(request: Request) -> str | None:
    """The stop string that ended it, as vLLM says it: null for an end token or the limit."""
    return None if request.text is None else request.text.stop_reason


def usage(requests: Sequence[Request], *, num_choices: int) -> Json:
    """Token counts; a prompt that several choices share is counted once."""
    prompt = sum(request.num_prompt for request in requests[::num_choices])
    cached = sum(request.num_cached for request in requests[::num_choices])
    completion = sum(request.num_output for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(requests: Sequence[Request]) -> Json:
    """Milliseconds of a request's life; of several choices the longest each."""
    return {
        "queue_ms": max(_ms(r.arrived_ns, r.scheduled_ns) for r in requests),
        "prefill_ms": max(_ms(r.scheduled_ns, r.first_token_ns) for r in requests),
        "decode_ms": max(_ms(r.first_token_ns, r.finished_ns) for r in requests),
        "ttft_ms": max(_ms(r.arrived_ns, r.first_token_ns) for r in requests),
    }


def answer(
    choices: list[Json],
    requests: Sequence[Request],
    *,
    envelope: Envelope,
    num_choices: int,
) -> JSONResponse:
    """The whole answer around `choices`; each prompt has `num_choices` of them."""
    content = envelope.around(choices)
    content["usage"] = usage(requests, num_choices=num_choices)
    content["timings"] = timings(requests)
    return _AnswerResponse(content, headers=origin_headers(requests))


def origin_headers(requests: Sequence[Request]) -> dict[str, str]:
    """`x-cache`: hit, coalesced, or partial when some were computed; none when all were."""
    origins = {request.origin for request in requests}
    if origins == {Origin.COMPUTED}:
        return {}
    if origins == {Origin.CACHED}:
        return {"x-cache": "hit"}
    return {"x-cache": "partial" if Origin.COMPUTED in origins else "coalesced"}


def completion_choice(
    request: Request,
    vocabulary: Vocabulary,
    *,
    index: int,
    echo: bool,
    return_token_ids: bool,
    names_ids: bool,
) -> Json:
    """One entry of `choices` of /v1/completions."""
    prompt_text = vocabulary.decode(request.prompt_ids) if echo else ""
    choice: Json = {
        "index": index,
        "text": prompt_text + output_text(request, vocabulary),
        "logprobs": completion_logprobs(
            request, vocabulary, start=0, echo=echo, names_ids=names_ids
        ),
        "finish_reason": finish_reason(request),
        "stop_reason": stop_reason(request),
    }
    if return_token_ids:
        choice["token_ids"] = request.output_ids
        choice["prompt_token_ids"] = request.prompt_ids
    return choice


def chat_choice(
    request: Request, vocabulary: Vocabulary, *, index: int, return_token_ids: bool
) -> Json:
    """One entry of `choices` of /v1/chat/completions."""
    choice: Json = {
        "index": index,
        "message": {"role": "assistant", "content": output_text(request, vocabulary)},
        "logprobs": chat_logprobs(request, vocabulary, start=0),
        "finish_reason": finish_reason(request),
        "stop_reason": stop_reason(request),
    }
    if return_token_ids:
        choice["token_ids"] = request.output_ids
        choice["prompt_token_ids"] = request.prompt_ids
    return choice


def completion_logprobs(
    request: Request,
    vocabulary: Vocabulary,
    *,
    start: int,
    echo: bool,
    names_ids: bool,
    end: int | None = None,
    offset: int = 0,
) -> Json | None:
    """`logprobs` of output tokens `start` to `end`, after the prompt's when `echo`.

    `names_ids` names tokens by their ids, as vLLM's return_tokens_as_token_ids does. `offset` is
    the length of the names before, from which `text_offset` goes on.
    """
    name = _name_of_id if names_ids else vocabulary.token_text
    params = request.params
    if not params.wants_logprobs:
        return None
    found = request.logprobs[start:end]
    result: Json = {}
    if params.num_logprobs is not None:
        tokens: list[str] = []
        values: list[float | None] = []
        top: list[dict[str, float] | None] = []
        if echo and start == 0:
            tokens.append(name(request.prompt_ids[0]))
            values.append(None)
            top.append(None)
            found = request.prompt_logprobs + found
        for entry in found:
            tokens.append(name(entry.token_id))
            values.append(entry.logprob)
            top.append(_top_by_name(entry, name))
        offsets = []
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        result = {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": top if params.num_logprobs else None,
            "text_offset": offsets,
        }
    if params.logprob_token_ids:
        result["token_id_logprobs"] = _by_token_id(request, start, end)
    return result


def chat_logprobs(
    request: Request, vocabulary: Vocabulary, *, start: int, end: int | None = None
) -> Json | None:
    """`logprobs` of output tokens `start` to `end` in the form of chat completions."""
    params = request.params
    if not params.wants_logprobs:
        return None
    result: Json = {}
    if params.num_logprobs is not None:
        result["content"] = [
            _chat_entry(entry.token_id, entry.logprob, vocabulary)
            | {"top_logprobs": [_chat_entry(*pair, vocabulary) for pair in entry.top]}
            for entry in request.logprobs[start:end]
        ]
    if params.logprob_token_ids:
        result["token_id_logprobs"] = _by_token_id(request, start, end)
    return result


def _by_token_id(request: Request, start: int, end: int | None) -> list[dict[str, float]]:
    names = [str(token) for token in request.params.logprob_token_ids]
    return [
        dict(zip(names, entry.of_token_ids, strict=True)) for entry in request.logprobs[start:end]
    ]


def _name_of_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _top_by_name(entry: TokenLogprob, name: Callable[[int], str]) -> dict[str, float]:
    """Best first; of tokens with the same text the best; always with the chosen one."""
    result: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        result.setdefault(name(token), logprob)
    return result


def _chat_entry(token_id: int, logprob: float, vocabulary: Vocabulary) -> Json:
    text = vocabulary.token_text(token_id)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _ms(start_ns: int, end_ns: int) -> float:
    """0 for a phase that the request never reached."""
    return max(0, end_ns - start_ns) / 1e6 if start_ns and end_ns else 0.0
