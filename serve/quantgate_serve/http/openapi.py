"""/openapi.json: what each route takes and gives, from the models that check it.

Routes read their bodies themselves, for errors in OpenAI's form, so the description is put together
here.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from quantgate_serve.http import answers
from quantgate_serve.http.bodies import ChatBody, CompletionBody, EmbeddingBody

Json = dict[str, Any]
_REF = "#/components/schemas/{model}"
_REFUSALS = {
    "400": "The request is wrong; `param` names the value.",
    "401": "The API key is missing or unknown.",
    "403": "The API key does not allow this.",
    "404": "There is no such path or model.",
    "405": "The path takes another method.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "429": "The queue is full; come back after `Retry-After` seconds.",
    "500": "The server failed on this request.",
    "503": "There is no engine at the moment.",
    "504": "The deadline has passed.",
    "507": "The request does not fit into memory.",
}


def describe(*, needs_key: bool) -> Json:
    """The OpenAPI 3.1 document; with `needs_key`, of a server that asks for API keys."""
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": "quantgate serve", "version": _version()},
        "paths": {
            "/v1/completions": {
                "post": _post("Continue a prompt", CompletionBody, answers.CompletionAnswer)
            },
            "/v1/chat/completions": {
                "post": _post("Answer messages", ChatBody, answers.ChatAnswer)
            },
            "/v1/embeddings": {
                "post": _post("Embed texts", EmbeddingBody, answers.EmbeddingAnswer)
            },
            "/v1/models": {"get": _get("List the model", answers.ModelList, ("401",))},
            "/v1/models/{name}": {
                "parameters": [_parameter("name", "path", {"type": "string", "minLength": 1})],
                "get": _get("Describe the model", answers.ModelCard, ("401", "404")),
            },
            "/health": {"get": _text("Whether the engine lives")},
            "/ready": {"get": _text("Whether requests are taken")},
            "/metrics": {"get": _text("Prometheus metrics", refusals=("401", "403"))},
            "/debug/requests": {"get": _lives()},
        },
        "components": {"schemas": _schemas()},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in document["paths"].items():
            if path not in ("/health", "/ready"):
                for operation in item.values():
                    if isinstance(operation, dict):
                        operation["security"] = [{"key": []}]
    return document


def _post(summary: str, body: type[BaseModel], answer: type[BaseModel]) -> Json:
    operation: Json = {
        "summary": summary,
        "parameters": [
            _parameter(
                "x-request-deadline-ms",
                "header",
                {"type": "number", "minimum": 1, "maximum": 86_400_000},
            )
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(body)}},
        },
        "responses": {"200": _json_answer("The answer.", answer)} | _refusals(tuple(_REFUSALS)),
    }
    if "stream" in body.model_fields:
        operation["responses"]["200"]["content"]["text/event-stream"] = {
            # Without a type: some readers take it for the body's, others for each event's.
            "schema": {"description": "Server-sent events, when `stream` is true."}
        }
    return operation


def _get(summary: str, answer: type[BaseModel], refusals: tuple[str, ...]) -> Json:
    return {
        "summary": summary,
        "responses": {"200": _json_answer("The answer.", answer)} | _refusals(refusals),
    }


def _text(summary: str, *, refusals: tuple[str, ...] = ()) -> Json:
    content = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "It is so.", "content": content},
            "503": {"description": "Not now.", "content": content},
        }
        | _refusals(refusals),
    }


def _lives() -> Json:
    content = {
        "application/json": {"schema": {"type": "object"}},
        "text/html": {"schema": {"type": "string"}},
    }
    return {
        "summary": "The recent requests' lives",
        "responses": {"200": {"description": "JSON, or a page for a browser.", "content": content}}
        | _refusals(("401", "403")),
    }


def _refusals(statuses: tuple[str, ...]) -> Json:
    return {status: _json_answer(_REFUSALS[status], answers.ErrorAnswer) for status in statuses}


def _json_answer(description: str, answer: type[BaseModel]) -> Json:
    return {
        "description": description,
        "content": {"application/json": {"schema": _ref(answer)}},
    }


def _parameter(name: str, place: str, schema: Json) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _REF.format(model=model.__name__)}


def _schemas() -> Json:
    bodies: tuple[type[BaseModel], ...] = (CompletionBody, ChatBody, EmbeddingBody)
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (model, "validation") for model in (*bodies, *answers.DESCRIBED)
    ]
    _, schema = models_json_schema(wanted, ref_template=_REF)
    schemas: Json = schema["$defs"]
    return schemas


def _version() -> str:
    try:
        return version("quantgate")
    except PackageNotFoundError:
        return "unknown"
