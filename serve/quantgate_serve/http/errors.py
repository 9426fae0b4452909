"""Errors as OpenAI words them: a status and `{"error": {message, type, param, code}}`."""

from starlette.responses import JSONResponse

_TYPES = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


# What is wrong may be as long as the body; of a name or a value that much is enough to find it.
_MAX_MESSAGE_CHARS = 1000
_MAX_PARAM_CHARS = 200


class ApiError(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        message = _shortened(message, _MAX_MESSAGE_CHARS)
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = None if param is None else _shortened(param, _MAX_PARAM_CHARS)
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)

    def body(self) -> dict[str, dict[str, str | None]]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def unexpected(error: Exception) -> ApiError:
    """A 500 for a fault of the server's own."""
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal")


def invalid(param: str | None, message: str) -> ApiError:
    """A 400 about one value; `message` says what was expected."""
    text = message if param is None else f"{_shortened(param, _MAX_PARAM_CHARS)}: {message}"
    return ApiError(400, text, param=param, code="invalid_value")


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
