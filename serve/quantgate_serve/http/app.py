"""The ASGI application: which path leads where, and errors in OpenAI's form."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from quantgate_serve import exposition
from quantgate_serve.channel import Loaded
from quantgate_serve.http import debug, exchange, openapi, responses
from quantgate_serve.http.chat import chat_completions
from quantgate_serve.http.completions import completions
from quantgate_serve.http.embeddings import embeddings
from quantgate_serve.http.errors import ApiError, unexpected
from quantgate_serve.http.request_id import RequestIds
from quantgate_serve.http.service import Service
from quantgate_serve.http.shortcut import Answer, Shortcut

ErrorForm = Callable[[HttpRequest, Exception], Awaitable[Response]]


class _App(Starlette):
    """Puts what every request passes around Starlette's own layers, of which most need none."""

    def __init__(self, answers: Mapping[str, Answer], **options: Any) -> None:
        super().__init__(**options)
        self._answers = answers

    def build_middleware_stack(self) -> ASGIApp:
        return RequestIds(Shortcut(super().build_middleware_stack(), self._answers))


def build_app(service: Service) -> Starlette:
    """The ASGI application over `service`."""
    answers = {
        "/v1/completions": _route(service, completions),
        "/v1/chat/completions": _route(service, chat_completions),
        "/v1/embeddings": _route(service, embeddings),
    }
    app = _App(
        answers,
        routes=[
            # For other methods than the shortcut's.
            *(Route(path, answer, methods=["POST"]) for path, answer in answers.items()),
            *_models(service),
            *_probes(service),
        ],
        exception_handlers=_error_forms(),
    )
    # A redirect to a path without the slash would name the host that the client claims to ask.
    app.router.redirect_slashes = False
    return app


def _probes(service: Service) -> list[BaseRoute]:
    async def health(_: HttpRequest) -> Response:
        if service.engine.is_alive:
            return PlainTextResponse("ok")
        return PlainTextResponse("the engine is not running", status_code=503)

    async def ready(_: HttpRequest) -> Response:
        if service.is_ready:
            return PlainTextResponse("ready")
        state = "draining" if service.is_draining else "warming up"
        return PlainTextResponse(state, status_code=503, headers={"retry-after": "1"})

    async def metrics(http: HttpRequest) -> Response:
        service.check_operator(http)
        await service.engine.count()
        # In a thread: some milliseconds of formatting would hold up every stream.
        text = await asyncio.to_thread(service.exposition.render)
        return Response(text, media_type=exposition.CONTENT_TYPE)

    async def debug_requests(http: HttpRequest) -> Response:
        # Where there are keys an operator's is asked for, also of a proxy on this machine.
        if service.needs_key:
            service.check_operator(http)
        else:
            debug.check_loopback(http)
        lives = service.lives.recent(service.engine.in_flight)
        return debug.lives_answer(http, lives, model_name=service.model_name)

    description = openapi.describe(needs_key=service.needs_key)

    async def openapi_json(_: HttpRequest) -> Response:
        return JSONResponse(description)

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/debug/requests", debug_requests),
        Route("/openapi.json", openapi_json),
    ]


def _models(service: Service) -> list[BaseRoute]:
    async def models(http: HttpRequest) -> Response:
        service.tenant(http)
        return JSONResponse({"object": "list", "data": [_model_card(service)]})

    async def model(http: HttpRequest) -> Response:
        service.tenant(http)
        service.check_model(http.path_params["name"])
        return JSONResponse(_model_card(service))

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def _route(
    service: Service, answer: Callable[[Service, HttpRequest], Awaitable[Response]]
) -> Answer:
    async def route(http: HttpRequest) -> Response:
        return await answer(service, http)

    return route


def _model_card(service: Service) -> responses.Json:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "quantgate",
        "max_model_len": service.engine.limits.max_request_tokens,
        "kernels": _kernels(service.engine.loaded),
    }


def _kernels(loaded: Loaded | None) -> list[responses.Json]:
    """What computes the Linears; nothing while there is no engine."""
    if loaded is None:
        return []
    now = loaded.metrics.now
    return [
        {"name": name, "linears": count, "slow": now.slow_kernels.get(name)}
        for name, count in now.kernel_linears.items()
    ]


def _error_forms() -> dict[int | type[Exception], ErrorForm]:
    async def api_error(_: HttpRequest, error: Exception) -> Response:
        return error.response() if isinstance(error, ApiError) else unexpected(error).response()

    async def http_error(http: HttpRequest, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return unexpected(error).response()
        headers = dict(error.headers or {})
        text = _routing_text(http, error)
        return ApiError(error.status_code, text, code="http_error", headers=headers).response()

    async def client_gone(_: HttpRequest, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; nginx's number for the access log

    async def other(_: HttpRequest, error: Exception) -> Response:
        return unexpected(error).response()

    return {
        ApiError: api_error,
        HTTPException: http_error,
        exchange.ClientGoneError: client_gone,
        Exception: other,
    }


def _routing_text(http: HttpRequest, error: HTTPException) -> str:
    """What the router's refusal means for this request; its own words name nothing."""
    path = http.scope["path"]
    if error.status_code == 404:
        return f"there is no path {path} here; /openapi.json lists all."
    if error.status_code == 405:
        allowed = sorted((error.headers or {})["Allow"].split(", "))
        return f"{path} does not take {http.method}, only {' and '.join(allowed)}."
    return str(error.detail)
