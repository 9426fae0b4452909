"""The routes. Each reads a body, makes requests of it, and answers in OpenAI's form."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, perf_counter_ns

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from quantgate_serve import exposition
from quantgate_serve.client import EngineClient
from quantgate_serve.detokenize import TextStream
from quantgate_serve.exposition import Exposition
from quantgate_serve.http import exchange, responses, sse
from quantgate_serve.http.errors import ApiError
from quantgate_serve.http.protocol import (
    ChatBody,
    CompletionBody,
    check_token_ids,
    choose_seed,
    parse_body,
    parse_messages,
    parse_prompts,
    sampling_params,
)
from quantgate_serve.request import Request
from quantgate_serve.vocabulary import ChatTemplateError, Vocabulary


class Service:
    """What the routes share: one engine, one vocabulary, one name."""

    def __init__(
        self,
        engine: EngineClient,
        vocabulary: Vocabulary,
        *,
        model_name: str,
        vocab_size: int,
        eos_ids: frozenset[int],
        max_body_bytes: int,
        metrics_compat: str | None = None,
    ) -> None:
        self.engine = engine
        self.vocabulary = vocabulary
        self.model_name = model_name
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.max_body_bytes = max_body_bytes
        self.exposition = Exposition(
            model_name, lambda: engine.metrics, engine.front, also_vllm=metrics_compat == "vllm"
        )
        self.is_draining = False
        self.created_s = responses.now_s()
        # Tokenising is done here, so that a long prompt does not hold up the event loop.
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    @property
    def is_ready(self) -> bool:
        return self.engine.is_warm and self.engine.is_alive and not self.is_draining

    async def encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; empty prompts are refused with a 400."""
        started = perf_counter()

        def work() -> list[list[int]]:
            encode = self.vocabulary.encode
            return [encode(text, add_special_tokens=add_special_tokens) for text in texts]

        found = await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, work)
        self.engine.front.tokenize_s.observe(perf_counter() - started)
        for ids in found:
            check_token_ids(ids, param="prompt", vocab_size=self.vocab_size)
        return found

    async def read(self, http: HttpRequest) -> bytes:
        """The body, refused with a 413 as soon as it is too large."""
        limit = self.max_body_bytes
        declared = http.headers.get("content-length", "0")
        size = int(declared) if declared.isdigit() else 0
        body = bytearray()
        if size <= limit:
            async for part in http.stream():
                body += part
                size = len(body)
                if size > limit:
                    break
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes.", code="request_too_large")
        return bytes(body)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def requests(
        self,
        body: CompletionBody | ChatBody,
        prompts: list[list[int]],
        *,
        max_tokens: int,
        arrived_ns: int,
    ) -> list[Request]:
        """One request for each choice of each prompt."""
        if body.logprob_token_ids:
            check_token_ids(
                body.logprob_token_ids, param="logprob_token_ids", vocab_size=self.vocab_size
            )
        seed = choose_seed(body.seed)
        result = []
        for ids in prompts:
            for choice in range(body.n):
                params = sampling_params(body, max_tokens=max_tokens, choice=choice, base_seed=seed)
                needs_text = body.stream or params.stop
                text = TextStream(self.vocabulary.decode, stop=params.stop) if needs_text else None
                result.append(
                    Request(
                        prompt_ids=ids,
                        params=params,
                        eos_ids=self.eos_ids,
                        text=text,
                        arrived_ns=arrived_ns,
                    )
                )
        return result


def build_app(service: Service) -> FastAPI:
    """The ASGI application over `service`."""

    app = FastAPI(title="quantgate serve", openapi_url="/openapi.json")

    @app.get("/health")
    async def health() -> Response:
        if service.engine.is_alive:
            return PlainTextResponse("ok")
        return PlainTextResponse("the engine is not running", status_code=503)

    @app.get("/ready")
    async def ready() -> Response:
        if service.is_ready:
            return PlainTextResponse("ready")
        state = "draining" if service.is_draining else "warming up"
        return PlainTextResponse(state, status_code=503, headers={"retry-after": "1"})

    @app.get("/metrics")
    async def metrics() -> Response:
        # In a thread: some milliseconds of formatting would hold up every stream.
        text = await asyncio.to_thread(service.exposition.render)
        return Response(text, media_type=exposition.CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(_model_card(service))

    @app.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        return await _completions(service, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest) -> Response:
        return await _chat_completions(service, http)

    _add_error_forms(app)
    return app


async def _completions(service: Service, http: HttpRequest) -> Response:
    arrived_ns = perf_counter_ns()
    body = parse_body(CompletionBody, await service.read(http))
    service.check_model(body.model)
    prompts = parse_prompts(body.prompt, vocab_size=service.vocab_size)
    ids = prompts.token_ids
    if ids is None:
        ids = await service.encode(prompts.texts or [], add_special_tokens=body.add_special_tokens)
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    requests = service.requests(body, ids, max_tokens=max_tokens, arrived_ns=arrived_ns)
    if body.stream:
        form = sse.CompletionForm(service.vocabulary, body, service.model_name)
        return sse.EventStream(service.engine, requests, form, usage_choices=body.usage_choices)
    await exchange.complete(service.engine, requests, http)
    choices = [
        responses.completion_choice(
            request,
            service.vocabulary,
            index=index,
            echo=body.echo,
            return_token_ids=body.return_token_ids,
        )
        for index, request in enumerate(requests)
    ]
    return _answer(service, "cmpl", "text_completion", choices, requests, body.n)


async def _chat_completions(service: Service, http: HttpRequest) -> Response:
    arrived_ns = perf_counter_ns()
    body = parse_body(ChatBody, await service.read(http))
    service.check_model(body.model)
    messages = parse_messages(body.messages)
    try:
        text = service.vocabulary.render_chat(messages)
    except ChatTemplateError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error
    # The template writes the special tokens itself.
    (ids,) = await service.encode([text], add_special_tokens=False)
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is None:
        max_tokens = max(1, service.engine.limits.max_request_tokens - len(ids))
    requests = service.requests(body, [ids], max_tokens=max_tokens, arrived_ns=arrived_ns)
    if body.stream:
        form = sse.ChatForm(service.vocabulary, body, service.model_name)
        return sse.EventStream(service.engine, requests, form, usage_choices=body.usage_choices)
    await exchange.complete(service.engine, requests, http)
    choices = [
        responses.chat_choice(
            request, service.vocabulary, index=index, return_token_ids=body.return_token_ids
        )
        for index, request in enumerate(requests)
    ]
    return _answer(service, "chatcmpl", "chat.completion", choices, requests, body.n)


def _answer(
    service: Service,
    prefix: str,
    kind: str,
    choices: list[responses.Json],
    requests: list[Request],
    num_choices: int,
) -> Response:
    return JSONResponse(
        {
            "id": responses.new_id(prefix),
            "object": kind,
            "created": responses.now_s(),
            "model": service.model_name,
            "choices": choices,
            "usage": responses.usage(requests, num_choices=num_choices),
            "timings": responses.timings(requests),
        }
    )


def _model_card(service: Service) -> responses.Json:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "quantgate",
        "max_model_len": service.engine.limits.max_request_tokens,
    }


def _add_error_forms(app: FastAPI) -> None:
    async def api_error(_: HttpRequest, error: Exception) -> Response:
        return error.response() if isinstance(error, ApiError) else _unexpected(error)

    async def http_error(_: HttpRequest, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return _unexpected(error)
        return ApiError(error.status_code, str(error.detail), code="http_error").response()

    async def client_gone(_: HttpRequest, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; nginx's number for the access log

    async def other(_: HttpRequest, error: Exception) -> Response:
        return _unexpected(error)

    forms: dict[type[Exception], Callable[[HttpRequest, Exception], Awaitable[Response]]] = {
        ApiError: api_error,
        HTTPException: http_error,
        exchange.ClientGoneError: client_gone,
        Exception: other,
    }
    for kind, form in forms.items():
        app.add_exception_handler(kind, form)


def _unexpected(error: Exception) -> Response:
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal").response()
