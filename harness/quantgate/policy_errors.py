"""pydantic's errors about a policy, in the words of the file."""

from __future__ import annotations

from pydantic_core import ErrorDetails

from quantgate.gate import Refused
from quantgate.spec import Document, Problem
from quantgate.units import did_you_mean

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_exact_type": 'a quantity, as in "250 ms"',
}
_WRITE = {
    "policy": "policy: NAME",
    "model": "model: demo",
    "device": "device: auto | cpu | cuda | cuda:0",
    "variants": "variants: {bf16: {scheme: bf16}}",
    "scheme": "scheme: int4-gptq",
    "golden_set": "golden_set: NAME",
    "seed": "seed: 0",
    "rate": "rate: 20 req/s",
    "requests": "requests: 60",
    "burst_requests": "burst_requests: 32",
    "prompt_tokens": "prompt_tokens: [32, 256]",
    "output_tokens": "output_tokens: [16, 64]",
    "timeout": "timeout: 60 s",
    "max_context": "max_context: 4096",
    "admission_window": "admission_window: 5 ms",
    "confidence": "confidence: 0.95",
    "gates": "gates: [{id: oom, metric: stability/oom.count, test: limit, max: 0 count}]",
    "id": "id: NAME (letters, digits, dots, dashes)",
    "metric": "metric: quality/kl_nats.mean",
    "test": "test: limit",
    "schemes": "schemes: [int4-nf4, int4-gptq]",
}


def problems_of(document: Document, details: ErrorDetails) -> list[Problem]:
    """One of pydantic's errors as what is wrong at which line, and what to write."""
    location = tuple(details["loc"])
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, Refused):
        return [document.problem((*location, *inner), text) for inner, text in cause.problems]
    # A union reports one error per arm, with the arm's type in the location: no key of the file.
    keys = [part for part in location if isinstance(part, str)]
    key = next(
        (part for part in reversed(keys) if part in _WRITE), keys[-1] if keys else "the file"
    )
    return [document.problem(location, _message_of(details, key, cause))]


def _message_of(details: ErrorDetails, key: str, cause: object) -> str:
    if cause is not None:
        return str(cause)
    hint = f"; write: {_WRITE[key]}" if key in _WRITE else ""
    if details["type"] == "missing":
        return f'"{details["loc"][-1]}" is missing{hint}'
    found = details["input"]
    if details["type"] == "literal_error":
        expected = details["ctx"]["expected"].replace("'", "")
        near = did_you_mean(str(found), expected.replace(" or ", ", ").split(", "))
        return f'{key} is "{found}"; expected {expected}{near}'
    expected = _EXPECTED.get(details["type"])
    if expected is None:
        # pydantic's own sentences about ranges and lengths are plain English.
        expected = details["msg"][:1].lower() + details["msg"][1:]
        return f"{key} is {found!r}: {expected}{hint}"
    return f"{key} is {found!r}; expected {expected}{hint}"
