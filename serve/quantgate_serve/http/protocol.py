"""What a client may send, checked and turned into plain values.

Unknown keys are ignored, as vLLM does; known features that would change the answer and are not here
are refused. null stands for the default, as in OpenAI's own schema. Types are strict: "5" is no
number. The models also describe the bodies in /openapi.json.
"""

import random
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.config import JsonDict

from quantgate_serve.http.errors import ApiError, invalid
from quantgate_serve.http.json_body import parse_object
from quantgate_serve.keys import PriorityName
from quantgate_serve.request import SamplingParams
from quantgate_serve.structured import GrammarError, StructuredMissingError, json_grammar

MAX_PROMPTS = 2048
_MAX_LOGPROBS = 20
_MAX_CHOICES = 64
_INT64 = 1 << 63
# pydantic's names for the members of a union of a string and a list.
_UNION_FORMS = ("str", "constrained-str")


def _integral(value: object) -> object:
    """JSON has one kind of number: 5.0 is the integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_integral)]
# A stop string is compared with the end of the text at every token, so its length is bounded.
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=16)]
_PROMPT_FORMS: JsonDict = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
        },
    ]
}


def _allow_null(schema: dict[str, Any]) -> None:
    """Say in the description that what may be left out may also be null."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class _Body(BaseModel):
    """An object in which null means: not given."""

    model_config = ConfigDict(
        extra="ignore", strict=True, allow_inf_nan=False, json_schema_extra=_allow_null
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(_Body):
    include_usage: bool = False


class JsonSchemaFormat(_Body):
    name: str = "answer"
    schema_: dict[str, Any] = Field(alias="schema", default={})
    strict: bool = True


class ResponseFormat(_Body):
    """The form of the text: `json_object` and `json_schema` constrain the tokens to it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class RequestBody(_Body):
    """What all routes that compute something share."""

    model: str | None = None
    priority: PriorityName | None = Field(
        default=None, description="Urgency; which ones are allowed depends on the API key."
    )
    deadline_ms: float | None = Field(
        default=None, ge=1.0, le=86_400_000.0,
        description="Answer 504 when it takes longer; header x-request-deadline-ms says the same.",
    )  # fmt: skip


class GenerationBody(RequestBody):
    """What both completion routes share."""

    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: Int = Field(default=0, ge=-1, lt=_INT64, description="0 or -1 keeps all tokens.")
    seed: Int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: StopString | StopStrings | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Int = Field(default=1, ge=1, le=_MAX_CHOICES)
    response_format: ResponseFormat | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    logprob_token_ids: list[Int] | None = Field(default=None, max_length=1024)
    # Known, and only accepted at the values that change nothing.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: dict[str, float] | None = None

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


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions."""

    prompt: Any = Field(json_schema_extra=_PROMPT_FORMS)
    max_tokens: Int = Field(default=16, ge=0)
    logprobs: Int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    echo: bool = False
    best_of: Int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class TextPart(_Body):
    """A piece of a message's content."""

    type: Literal["text"] = "text"
    text: str


class Message(BaseModel):
    """A message. What the chat template knows besides (a name, say) may be in it too."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[TextPart]


class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_PROMPTS)
    max_tokens: Int | None = Field(default=None, ge=1)
    max_completion_tokens: Int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: Int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    tools: list[Any] | None = None


class EmbeddingBody(RequestBody):
    """The body of POST /v1/embeddings."""

    input: Any = Field(json_schema_extra=_PROMPT_FORMS)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int | None = Field(
        default=None, ge=1, description="Only the model's own number of dimensions is accepted."
    )


Body = TypeVar("Body", bound=RequestBody)


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
        body = schema.model_validate(parse_object(raw))
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        # Of the forms of a union, the one that the value comes nearest to.
        about = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
        nearest = max(about, key=lambda one: len(one["loc"]))
        raise invalid(_place(nearest["loc"]), nearest["msg"]) from error
    if isinstance(body, GenerationBody):
        _refuse_unsupported(body)
    return body


def parse_prompts(prompt: Any, *, vocab_size: int, param: str = "prompt") -> Prompts:
    """A string, strings, token ids or lists of token ids.

    Raises:
        ApiError: 400, anything else, or an id that is not in the vocabulary.
    """
    if isinstance(prompt, str):
        return Prompts([prompt], None)
    if not isinstance(prompt, list) or not prompt:
        raise invalid(
            param, "expected a string, a list of strings, token ids, or a list of lists of them."
        )
    if all(isinstance(item, str) for item in prompt):
        _check_count(prompt, param)
        return Prompts(prompt, None)
    lists = [prompt] if not isinstance(prompt[0], list) else prompt
    _check_count(lists, param)
    for ids in lists:
        if not isinstance(ids, list) or not all(type(_integral(token)) is int for token in ids):
            raise invalid(
                param, "a list must hold only strings, only token ids, or only lists of these."
            )
    lists = [[int(token) for token in ids] for ids in lists]
    for ids in lists:
        check_token_ids(ids, param=param, vocab_size=vocab_size)
    return Prompts(None, lists)


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them, their content one text."""
    result = []
    for message in messages:
        content = message.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        result.append((message.model_extra or {}) | {"role": message.role, "content": content})
    return result


def check_token_ids(ids: list[int], *, param: str, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary with a 400."""
    if not ids:
        raise invalid(param, "no token ids were given.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise invalid(param, f"token id {wrong} is not in the vocabulary (0 to {vocab_size - 1}).")


def parse_grammar(body: GenerationBody) -> str | None:
    """The grammar that `response_format` asks for, None for free text.

    Raises:
        ApiError: 400, not a schema that can be followed, or the library is not installed.
    """
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if body.ignore_eos:
        raise invalid("response_format", "cannot be followed together with ignore_eos.")
    schema: dict[str, Any] = {"type": "object"}
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise invalid("response_format.json_schema", "is missing.")
        schema = wanted.json_schema.schema_
    try:
        return json_grammar(schema)
    except (GrammarError, StructuredMissingError) as error:
        raise invalid("response_format", str(error)) from error


def sampling_params(
    body: GenerationBody,
    *,
    max_tokens: int,
    choice: int,
    base_seed: int,
    grammar: str | None = None,
) -> SamplingParams:
    """Parameters of one of the body's `n` choices, each with a seed of its own."""
    if isinstance(body, CompletionBody):
        num_logprobs, wants_prompt = body.logprobs, body.echo and body.logprobs is not None
    elif isinstance(body, ChatBody):
        num_logprobs, wants_prompt = (body.top_logprobs or 0) if body.logprobs else None, False
    else:
        raise TypeError(f"{type(body).__name__} asks for no tokens")
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
        grammar=grammar,
    )


def choose_seed(seed: int | None) -> int:
    """The client's seed, or one of our own."""
    return random.getrandbits(63) if seed is None else seed


def _refuse_unsupported(body: GenerationBody) -> None:
    neutral: dict[str, tuple[object, ...]] = {
        "frequency_penalty": (None, 0.0),
        "presence_penalty": (None, 0.0),
        "repetition_penalty": (None, 1.0),
        "min_p": (None, 0.0),
        "logit_bias": (None, {}),
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
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs stream to be true.")
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true.")


def _check_count(prompts: list[Any], param: str) -> None:
    if len(prompts) > MAX_PROMPTS:
        raise invalid(param, f"{len(prompts)} prompts, the limit is {MAX_PROMPTS}.")


def _place(loc: tuple[int | str, ...]) -> str | None:
    """The dotted name of what is wrong, without pydantic's names for the forms of a union."""
    known = [str(part) for part in loc if isinstance(part, int) or "[" not in part]
    return ".".join(part for part in known if part not in _UNION_FORMS) or None
