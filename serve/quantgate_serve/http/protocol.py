"""From a body to what the engine is asked for: checked, and turned into plain values.

Known features that would change the answer and are not here are refused.
"""

import random
from typing import Any, TypeVar

from pydantic import ValidationError

from quantgate_serve.http.bodies import ChatBody, GenerationBody, Message, RequestBody
from quantgate_serve.http.errors import ApiError, invalid
from quantgate_serve.http.json_body import parse_object
from quantgate_serve.request import SamplingParams
from quantgate_serve.structured import GrammarError, StructuredMissingError, json_grammar

# Log-probabilities in one answer, over all its choices and positions. Each takes some 130 bytes
# until the answer is written.
MAX_LOGPROB_VALUES = 1 << 19
# pydantic's names for the members of a union of a string and a list.
_UNION_FORMS = ("str", "constrained-str")
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
