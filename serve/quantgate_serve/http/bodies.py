"""The shapes of bodies: what a client may send, with the bounds of each value.

Unknown keys are ignored, as vLLM does; null stands for the default, as in OpenAI's own schema.
Types are strict: "5" is no number. The models also describe the bodies in /openapi.json.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict

from quantgate_serve.http.prompts import MAX_PROMPTS, integral
from quantgate_serve.keys import PriorityName

_MAX_LOGPROBS = 20
_MAX_CHOICES = 64
_MAX_KEYS = 1024
_INT64 = 1 << 63


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
    # Known, and only accepted at the values that change nothing (see protocol.py).
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
