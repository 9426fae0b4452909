"""OpenTelemetry spans of requests, where someone asks for them (the extra `otel`).

A request is one span with the children queue, prefill and decode, made when it has ended: the
times are known then, and a running request costs nothing. Names and attributes follow the
semantic conventions for generative AI.
"""

from collections.abc import Sequence
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any

from quantgate_serve.request import FinishReason, Request

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_SERVICE = "quantgate"


class TracingUnavailableError(Exception):
    """Spans were asked for, but their packages are not installed."""


def export_to(endpoint: str) -> "TracerProvider":
    """A provider that sends spans to an OTLP/HTTP collector, from a thread of its own.

    Args:
        endpoint: the full URL, such as http://localhost:4318/v1/traces.

    Raises:
        TracingUnavailableError: the extra `otel` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingUnavailableError(
            f"--otlp-traces-endpoint {endpoint} needs OpenTelemetry ({error.name} is missing). "
            "Install it: pip install 'quantgate[otel]'."
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": _SERVICE}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Spans:
    """Turns requests that have ended into spans of `provider`."""

    def __init__(self, provider: "TracerProvider", *, model_name: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("quantgate_serve")
        self._model_name = model_name
        self._epoch_ns = time_ns() - perf_counter_ns()

    def add(self, request: Request) -> None:
        """Record `request`, which has ended."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        operation = request.operation
        span = self._tracer.start_span(
            f"{operation} {self._model_name}",
            context=_parent(request.traceparent),
            kind=SpanKind.SERVER,
            attributes=_attributes(request, operation, self._model_name),
            start_time=self._epoch_ns + request.arrived_ns,
        )
        if request.error is not None:
            span.set_attribute("error.type", request.error.code)
            span.set_status(Status(StatusCode.ERROR, request.error.message))
        context = set_span_in_context(span)
        for name, begun_ns, ended_ns in _parts(request):
            child = self._tracer.start_span(
                name, context=context, start_time=self._epoch_ns + begun_ns
            )
            child.end(self._epoch_ns + ended_ns)
        span.end(self._epoch_ns + request.finished_ns)

    def close(self) -> None:
        """Send what is left, waiting a bounded time."""
        self._provider.shutdown()


def _parent(traceparent: str | None) -> Any:
    """The caller's context, from the W3C header of that name; None without one."""
    if traceparent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _parts(request: Request) -> list[tuple[str, int, int]]:
    """(name, begin, end) of the stations that the request has left behind."""
    queued_ns = request.queued_ns or request.arrived_ns
    stations = [
        ("queue", queued_ns, request.scheduled_ns or request.finished_ns),
        ("prefill", request.scheduled_ns, request.first_token_ns or request.finished_ns),
        ("decode", request.first_token_ns, request.finished_ns),
    ]
    return [station for station in stations if station[1]]


def _attributes(request: Request, operation: str, model_name: str) -> dict[str, Any]:
    params = request.params
    found: dict[str, str | int | float | Sequence[str] | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _SERVICE,
        "gen_ai.request.model": model_name,
        "gen_ai.response.model": model_name,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.stop_sequences": params.stop or None,
        "gen_ai.response.id": None,
        "gen_ai.response.finish_reasons": (_finish_reason(request.finish_reason),),
        "gen_ai.usage.input_tokens": request.num_prompt,
        "gen_ai.usage.output_tokens": request.num_output,
        "gen_ai.usage.cache_read.input_tokens": request.num_cached,
        "quantgate.priority": request.priority.label,
        "quantgate.preemptions": request.num_preemptions,
    }
    if request.is_streaming:
        found["gen_ai.request.stream"] = True
    if request.first_token_ns:
        found["gen_ai.response.time_to_first_chunk"] = (
            request.first_token_ns - request.arrived_ns
        ) / 1e9
    return {name: value for name, value in found.items() if value is not None}


def _finish_reason(reason: FinishReason | None) -> str:
    return "unknown" if reason is None else reason.value
