"""The shapes of answers, as /openapi.json describes them.

Answers are built as plain dictionaries (responses.py, sse.py), because a model per token would cost
more than the token; the tests hold the two together.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorText(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """Every refusal and failure."""

    error: ErrorText


class PromptTokensDetails(_Answer):
    cached_tokens: int


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(_Answer):
    """Milliseconds of a request's life; of several choices the longest each."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float


class CompletionLogprobs(_Answer):
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | None = None
    token_id_logprobs: list[dict[str, float]] | None = None


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionAnswer(_Answer):
    """The answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings


class TopLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    content: list[TokenLogprob] | None = None
    token_id_logprobs: list[dict[str, float]] | None = None


class ChatAnswerMessage(_Answer):
    role: Literal["assistant"]
    content: str


class ChatChoice(_Answer):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatAnswer(_Answer):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class Embedding(_Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(
        description="A vector of length 1; with base64 its FP32 values, little endian."
    )


class EmbeddingUsage(_Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(_Answer):
    """The answer to POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class KernelUse(_Answer):
    name: str
    linears: int = Field(description="How many of the model's Linears it computes.")
    slow: str | None = Field(description="Why it is slow on this device and what to do, if it is.")


class ModelCard(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="Most tokens of prompt and answer together.")
    kernels: list[KernelUse] = Field(description="What computes the model's Linears.")


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelCard]


DESCRIBED: tuple[type[BaseModel], ...] = (
    ErrorAnswer,
    CompletionAnswer,
    ChatAnswer,
    EmbeddingAnswer,
    ModelCard,
    ModelList,
)
