"""What a client may send, checked and turned into plain values.

Unknown keys are ignored, as vLLM does; known features that would change the answer and are not here
are refused.
"""

import json
import random
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantgate_serve.http.errors import ApiError
from quantgate_serve.request import SamplingParams

_MAX_LOGPROBS = 20
_MAX_CHOICES = 64


class StreamOptions(BaseModel):
    include_usage: bool = False


class _CommonBody(BaseModel):
    """What both completion routes share."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=_MAX_CHOICES)
    ignore_eos: bool = False
    return_token_ids: bool = False
    logprob_token_ids: list[int] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage_choices(self) -> int | None:
        """Choices of each prompt when a stream is to end with its usage, else None."""
        wants_usage = self.stream_options is not None and self.stream_options.include_usage
        return self.n if wants_usage else None


class CompletionBody(_CommonBody):
    prompt: Any
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class ChatBody(_CommonBody):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    tools: list[Any] | None = None


Body = TypeVar("Body", bound=_CommonBody)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as they came: all texts or all token ids."""

    texts: list[str] | None
    token_ids: list[list[int]] | None


def parse_body(schema: type[Body], raw: bytes) -> Body:
    """The body as `schema`.

    Raises:
        ApiError: 400 with the first thing that is wrong.
    """
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object.", code="invalid_json")
    try:
        body = schema.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise ApiError(
            400, f"{param}: {first['msg']}", param=param, code="invalid_value"
        ) from error
    _refuse_unsupported(body)
    return body


def parse_prompts(prompt: Any, *, vocab_size: int) -> Prompts:
    """A string, strings, token ids or lists of token ids.

    Raises:
        ApiError: 400, anything else, or an id that is not in the vocabulary.
    """
    if isinstance(prompt, str):
        return Prompts([prompt], None)
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(
            400,
            "prompt: expected a string, a list of strings, token ids, or a list of lists of them.",
            param="prompt",
            code="invalid_value",
        )
    if all(isinstance(item, str) for item in prompt):
        return Prompts(prompt, None)
    lists = [prompt] if all(type(item) is int for item in prompt) else prompt
    for ids in lists:
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ApiError(
                400,
                "prompt: a list must hold only strings, only token ids, or only lists of these.",
                param="prompt",
                code="invalid_value",
            )
        check_token_ids(ids, param="prompt", vocab_size=vocab_size)
    return Prompts(None, lists)


def parse_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a plain text.

    Raises:
        ApiError: 400, a message without role or text, or with a part that is no text.
    """
    result = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(part for part in parts if isinstance(part, str))
            if not all(isinstance(part, str) for part in parts):
                content = None
        if not isinstance(message.get("role"), str) or not isinstance(content, str):
            raise ApiError(
                400,
                f"messages.{index}: expected a role and a content of text.",
                param="messages",
                code="invalid_value",
            )
        result.append(message | {"content": content})
    return result


def check_token_ids(ids: list[int], *, param: str, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary with a 400."""
    if not ids:
        raise ApiError(400, f"{param}: no token ids were given.", param=param, code="invalid_value")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ApiError(
            400,
            f"{param}: token id {wrong} is not in the vocabulary (0 to {vocab_size - 1}).",
            param=param,
            code="invalid_value",
        )


def sampling_params(
    body: CompletionBody | ChatBody, *, max_tokens: int, choice: int, base_seed: int
) -> SamplingParams:
    """The parameters of choice `choice`; each choice has its own seed."""
    num_logprobs: int | None
    if isinstance(body, CompletionBody):
        num_logprobs, wants_prompt = body.logprobs, body.echo and body.logprobs is not None
    else:
        num_logprobs, wants_prompt = (body.top_logprobs or 0) if body.logprobs else None, False
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(0, body.top_k),
        seed=base_seed + choice,
        stop=body.stop_strings,
        ignore_eos=body.ignore_eos,
        num_logprobs=num_logprobs,
        prompt_logprobs=wants_prompt,
        logprob_token_ids=tuple(body.logprob_token_ids or ()),
    )


def choose_seed(seed: int | None) -> int:
    """The client's seed, or one of our own."""
    return random.getrandbits(63) if seed is None else seed


def _refuse_unsupported(body: _CommonBody) -> None:
    neutral: dict[str, tuple[object, ...]] = {
        "frequency_penalty": (None, 0.0),
        "presence_penalty": (None, 0.0),
        "repetition_penalty": (None, 1.0),
        "min_p": (None, 0.0),
        "logit_bias": (None, {}),
        "response_format": (None, {"type": "text"}),
        "suffix": (None, ""),
        "tools": (None, []),
        "best_of": (None, 1, body.n),
    }
    for name, accepted in neutral.items():
        value = getattr(body, name, None)
        if value not in accepted:
            raise ApiError(
                400, f"{name} is not supported by this server; leave it out.",
                param=name, code="unsupported_value",
            )  # fmt: skip
    stop = body.stop_strings
    if len(stop) > 16 or any(not text for text in stop):
        raise ApiError(
            400,
            "stop: expected up to 16 strings, none of them empty.",
            param="stop",
            code="invalid_value",
        )
    _check_chat_logprobs(body)


def _check_chat_logprobs(body: _CommonBody) -> None:
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise ApiError(
            400,
            "top_logprobs: needs logprobs to be true.",
            param="top_logprobs",
            code="invalid_value",
        )
