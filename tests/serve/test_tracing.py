"""Spans of requests, read back from OpenTelemetry's in-memory exporter."""

import sys
from time import perf_counter_ns, time_ns
from typing import Any

import pytest

from quantgate_serve.request import FinishReason, Request, RequestError, SamplingParams
from quantgate_serve.tracing import Spans, TracingUnavailableError, export_to

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otel is not installed")
MS = 1_000_000


def request_of(**times_ms: int) -> Request:
    start = perf_counter_ns()
    request = Request([1, 2, 3], SamplingParams(max_tokens=9, temperature=0.5, stop=("x",)))
    defaults = {"arrived": 0, "queued": 2, "scheduled": 10, "first_token": 30, "finished": 90}
    for name, at_ms in (defaults | times_ms).items():
        setattr(request, f"{name}_ns", 0 if at_ms < 0 else start + at_ms * MS)
    request.token_ids += [5, 6]
    request.num_cached = 2
    request.finish_reason = FinishReason.STOP
    return request


def record(request: Request) -> dict[str, Any]:
    """The spans of `request` by name, the request's own as "request"."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Spans(provider, model_name="tiny").add(request)
    spans = exporter.get_finished_spans()
    return {"request" if " " in span.name else span.name: span for span in spans}


def length_ms(span: Any) -> float:
    return float((span.end_time - span.start_time) / MS)


def test_a_request_is_a_span_with_queue_prefill_and_decode_inside() -> None:
    spans = record(request_of())
    assert spans.keys() == {"request", "queue", "prefill", "decode"}
    whole = spans["request"]
    assert (whole.name, whole.kind.name) == ("text_completion tiny", "SERVER")
    assert length_ms(whole) == 90
    assert [length_ms(spans[name]) for name in ("queue", "prefill", "decode")] == [8, 20, 60]
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent.span_id == whole.context.span_id
        assert whole.start_time <= spans[name].start_time <= spans[name].end_time <= whole.end_time
    assert abs(whole.start_time - time_ns()) < 60_000 * MS, "dated by the wall clock"


def test_attributes_follow_the_conventions_for_generative_ai() -> None:
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

    known = {v for k, v in vars(gen_ai_attributes).items() if k.startswith("GEN_AI_")}
    request = request_of()
    request.operation = "chat"
    request.is_streaming = True
    whole = record(request)["request"]
    assert {name for name in whole.attributes if name.startswith("gen_ai.")} <= known
    assert whole.attributes["gen_ai.operation.name"] == "chat"
    assert whole.attributes["gen_ai.request.model"] == "tiny"
    assert whole.attributes["gen_ai.request.stop_sequences"] == ("x",)
    assert whole.attributes["gen_ai.usage.input_tokens"] == 3
    assert whole.attributes["gen_ai.usage.output_tokens"] == 2
    assert whole.attributes["gen_ai.usage.cache_read.input_tokens"] == 2
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert whole.attributes["gen_ai.response.time_to_first_chunk"] == 0.03
    assert "gen_ai.request.top_k" not in whole.attributes, "0 means none was asked for"


def test_a_request_that_ended_in_the_queue_has_no_later_part() -> None:
    request = request_of(scheduled=-1, first_token=-1)
    request.finish_reason = FinishReason.ERROR
    request.error = RequestError("its deadline has passed", "deadline_expired")
    spans = record(request)
    assert spans.keys() == {"request", "queue"}
    assert length_ms(spans["queue"]) == 88
    assert spans["request"].status.status_code.name == "ERROR"
    assert spans["request"].attributes["error.type"] == "deadline_expired"


def test_the_span_hangs_below_the_callers() -> None:
    request = request_of()
    request.traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    whole = record(request)["request"]
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"


@pytest.mark.parametrize("header", ["nonsense", "00-0-0-00", ""])
def test_a_broken_trace_header_starts_a_trace_of_its_own(header: str) -> None:
    request = request_of()
    request.traceparent = header
    assert record(request)["request"].parent is None


def test_without_the_package_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingUnavailableError, match=r"pip install 'quantgate\[otel\]'"):
        export_to("http://127.0.0.1:4318/v1/traces")
