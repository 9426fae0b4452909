"""What a client may send, checked and turned into plain values.

Unknown keys are ignored, as vLLM does; known features that would change the answer and are not here
are refused. null stands for the default, as in OpenAI's own schema. Types are strict: "5" is no
number. The models also describe the bodies in /openapi.json.
"""

import random
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict

from quantgate_serve.http.errors import ApiError, invalid
from quantgate_serve.http.json_body import parse_object
from quantgate_serve.http.prompts import MAX_PROMPTS, integral
from quantgate_serve.keys import PriorityName
from quantgate_serve.request import SamplingParams
from quantgate_serve.structured import GrammarError, StructuredMissingError, json_grammar

# Log-probabilities in one answer, over all its choices and positions. Each takes some 130 bytes
# until the answer is written.
MAX_LOGPROB_VALUES = 1 << 19
_MAX_LOGPROBS = 20
_MAX_CHOICES = 64
_MAX_KEYS = 1024
_INT64 = 1 << 63
# pydantic's names for the members of a union of a string and a list.
_UNION_FORMS = ("str", "constrained-str")


def _bounded(value: object) -> object:
    """Refuse a large object before its values are looked at: each wrong one would be noted."""
    if isinstance(value, dict) and len(value) > _MAX_KEYS:
        raise ValueError(f"{len(value)} keys, the limit is {_MAX_KEYS}")
    return value


Int = Annotated[int, BeforeValidator(integral)]
# A stop string is compared with the end of the text at every token, so its length is bounded.
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=16, fail_fast=True)]
# How the description says that a feature is known and must stay off.
_ZERO: JsonDict = {"type": "number", "const": 0}
_ONE: JsonDict = {"type": "number", "const": 1}
_EMPTY_OBJECT: JsonDict = {"type": "object", "maxProperties": 0}
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


# pydantic's own words for the bounds of a number that a validator stands before.
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _describe(schema: dict[str, Any]) -> None:
    """Say in the description that what may be left out may also be null, and bounds as JSON has."""
    for name, field in schema.get("properties", {}).items():
        forms = field.get("anyOf", [field])
        for form in forms:
            for ours in _BOUNDS.keys() & form.keys():
                form[_BOUNDS[ours]] = form.pop(ours)
        if name not in schema.get("required", ()) and {"type": "null"} not in forms:
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class _Body(BaseModel):
    """An object in which null means: not given."""

    model_config = ConfigDict(
        extra="ignore", strict=True, allow_inf_nan=False, json_schema_extra=_describe
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
    logprob_token_ids: Annotated[list[Int], Field(max_length=1024, fail_fast=True)] | None = None
    # Known, and only accepted at the values that change nothing (see _refuse_unsupported).
    frequency_penalty: Annotated[float, WithJsonSchema(_ZERO)] | None = None
    presence_penalty: Annotated[float, WithJsonSchema(_ZERO)] | None = None
    repetition_penalty: Annotated[float, WithJsonSchema(_ONE)] | None = None
    min_p: Annotated[float, WithJsonSchema(_ZERO)] | None = None
    logit_bias: (
        Annotated[dict[str, float], BeforeValidator(_bounded), WithJsonSchema(_EMPTY_OBJECT)] | None
    ) = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the best tokens are wanted at each position beside the chosen one."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own log-probabilities are wanted."""
        return False

    @property
    def logprobs_per_position(self) -> int:
        """The chosen token's, the best ones' and those of the ids that are asked for."""
        best = 0 if self.num_logprobs is None else self.num_logprobs + 1
        return best + len(self.logprob_token_ids or ())

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
    return_tokens_as_token_ids: bool = Field(
        default=False,
        description='Name tokens in logprobs "token_id:ID": several ids can have one text.',
    )
    best_of: Annotated[Int, WithJsonSchema({"type": "integer", "const": 1})] | None = None
    suffix: Annotated[str, WithJsonSchema({"type": "string", "maxLength": 0})] | None = None
    add_special_tokens: bool = True

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


class TextPart(_Body):
    """A piece of a message's content."""

    type: Literal["text"] = "text"
    text: str


class Message(BaseModel):
    """A message. What the chat template knows besides (a name, say) may be in it too."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PROMPTS, fail_fast=True)]


def _bounded_parts(messages: object) -> object:
    """Refuse more parts in all than messages are allowed, before any of them is looked at."""
    if isinstance(messages, list):
        contents = [one.get("content") for one in messages if isinstance(one, dict)]
        count = sum(len(content) for content in contents if isinstance(content, list))
        if count > MAX_PROMPTS:
            raise ValueError(f"{count} parts of contents, the limit is {MAX_PROMPTS}")
    return messages


class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[
        list[Message],
        Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        BeforeValidator(_bounded_parts),
    ]
    max_tokens: Int | None = Field(default=None, ge=1)
    max_completion_tokens: Int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: Int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    tools: Annotated[list[Any], WithJsonSchema({"type": "array", "maxItems": 0})] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingBody(RequestBody):
    """The body of POST /v1/embeddings."""

    input: Any = Field(json_schema_extra=_PROMPT_FORMS)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int | None = Field(
        default=None, ge=1, description="Only the model's own number of dimensions is accepted."
    )


Body = TypeVar("Body", bound=RequestBody)


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


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them, their content one text."""
    result = []
    for message in messages:
        content = message.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        result.append((message.model_extra or {}) | {"role": message.role, "content": content})
    return result


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


def check_logprobs(body: GenerationBody, *, num_prompts: int, scored: int, max_tokens: int) -> None:
    """Refuse with a 400 what would take more memory than others can spare.

    `scored` is the number of prompt tokens whose own log-probabilities are wanted.
    """
    positions = body.n * (scored + max_tokens * num_prompts)
    values = positions * body.logprobs_per_position
    if values > MAX_LOGPROB_VALUES:
        raise invalid(
            "logprob_token_ids" if body.num_logprobs is None else "logprobs",
            f"{body.logprobs_per_position} at each of {positions} positions are {values}, "
            f"the limit is {MAX_LOGPROB_VALUES}. Ask for fewer, or send fewer prompts at once.",
        )


def sampling_params(
    body: GenerationBody,
    *,
    max_tokens: int,
    choice: int,
    base_seed: int,
    grammar: str | None = None,
) -> SamplingParams:
    """Parameters of one of the body's `n` choices, each with a seed of its own."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(0, body.top_k),
        seed=base_seed + choice,
        stop=body.stop_strings,
        ignore_eos=body.ignore_eos,
        num_logprobs=body.num_logprobs,
        prompt_logprobs=body.scores_prompt,
        logprob_token_ids=tuple(body.logprob_token_ids or ()),
        grammar=grammar,
    )


def choose_seed(seed: int | None) -> int:
    """The client's seed, or one of our own."""
    return random.getrandbits(63) if seed is None else seed


# What may only be asked for at the values that change nothing, beside null.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "min_p": (0.0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "best_of": (1,),
}


def _refuse_unsupported(body: GenerationBody) -> None:
    given = body.model_fields_set
    for name, neutral in _NEUTRAL.items():
        if name not in given:
            continue
        value = getattr(body, name)
        if value not in neutral and not (name == "best_of" and value == body.n):
            raise ApiError(
                400, f"{name} is not supported by this server; leave it out.",
                param=name, code="unsupported_value",
            )  # fmt: skip
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs stream to be true.")
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true.")


def _place(loc: tuple[int | str, ...]) -> str | None:
    """The dotted name of what is wrong, without pydantic's names for the forms of a union."""
    known = [str(part) for part in loc if isinstance(part, int) or "[" not in part]
    return ".".join(part for part in known if part not in _UNION_FORMS) or None
