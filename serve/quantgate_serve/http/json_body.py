"""From the bytes of a body to a JSON object that is safe to look at.

JSON as RFC 8259 has it: UTF-8, no NaN or Infinity, and no lone surrogates, which no tokenizer and
no answer could carry.
"""

import json
from typing import Any, NoReturn

from quantgate_serve.http.errors import ApiError


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_object(raw: bytes) -> dict[str, Any]:
    """The object that `raw` holds.

    Raises:
        ApiError: 400, it holds something else.
    """
    try:
        text = raw.decode("utf-8")
        values = _DECODER.decode(text)
        if b"\\u" in raw:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _no_json("a \\u escape is half of a surrogate pair") from error
    except UnicodeDecodeError as error:
        raise _no_json(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise _no_json("it is nested too deeply") from error
    except ValueError as error:
        raise _no_json(str(error)) from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object.", code="invalid_json")
    return values


def _no_json(reason: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {reason}.", code="invalid_json")
