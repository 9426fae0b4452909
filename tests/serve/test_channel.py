"""What crosses between the two processes arrives whole, and nobody waits for the other to read."""

import socket
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate_serve.channel import (
    ASKED,
    PROGRESS,
    Abort,
    Channel,
    ChannelClosedError,
    Counts,
    Ended,
    Frames,
    Message,
    StepReport,
    Submit,
    asked,
    frame,
    plain_logprobs,
    progress,
    request_of,
    set_progress,
    token_logprobs,
)
from quantgate_serve.detokenize import TextStream
from quantgate_serve.metrics import EngineMetrics
from quantgate_serve.request import (
    FinishReason,
    Priority,
    Request,
    RequestError,
    RequestState,
    SamplingParams,
    TokenLogprob,
)


def some_messages() -> list[Message]:
    request = Request([5, 6, 7], SamplingParams(stop=("x",), seed=3), eos_ids=frozenset([1]))
    return [
        Submit([asked(request)]),
        Submit([asked(request)], starts_at_once=True),
        Abort([request.id], FinishReason.STOP),
        StepReport([1], [1], [9], {1: [(9, -0.5, ((9, -0.5),), ())]}, [], counts_follow=True),
        StepReport([1], [1], [9], {}, [], False, {1: [(6, -0.25, (), ())]}),
        Counts.of(EngineMetrics(generation_tokens=7)),
    ]


@given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_messages_are_the_same_however_their_bytes_are_cut(cuts: list[int]) -> None:
    messages = some_messages()
    data = b"".join(frame(message) for message in messages)
    frames, found, at = Frames(), [], 0
    for cut in [*cuts, len(data)]:
        found += frames.feed(data[at : at + cut])
        at += cut
    found += frames.feed(data[at:])
    assert found == messages


def test_every_field_of_a_request_is_asked_or_progress_or_stays_on_its_side() -> None:
    front = {"listener", "text", "tokenized_ns", "queued_ns", "operation", "traceparent"}
    engine = {"token_ids", "pages", "num_computed", "logprobs", "prompt_logprobs", "hidden_sum"}
    stay = front | engine
    assert sorted([*ASKED, *PROGRESS, *stay]) == sorted(item.name for item in fields(Request))


def test_what_many_requests_ask_for_alike_crosses_once() -> None:
    params = SamplingParams(max_tokens=3, logprob_token_ids=tuple(range(700, 900)))
    requests = [Request([5, id], params) for id in range(9)]
    one, nine = (frame(Submit([asked(r) for r in some])) for some in (requests[:1], requests))
    assert len(nine) < 2 * len(one)
    (message,) = Frames().feed(nine)
    assert isinstance(message, Submit)
    copies = [request_of(values) for values in message.requests]
    assert [copy.prompt_ids for copy in copies] == [[5, id] for id in range(9)]
    assert all(copy.params is copies[0].params for copy in copies)
    assert copies[0].params == params


def test_a_copy_asks_for_the_same_and_takes_no_text_along() -> None:
    request = Request(
        [5, 6],
        SamplingParams(max_tokens=3, temperature=0.5),
        text=TextStream(lambda ids: "", stop=["a"]),
        listener=lambda delta: None,
        priority=Priority.BULK,
    )
    copy = request_of(asked(request))
    assert (copy.text, copy.listener) == (None, None)
    assert asked(copy) == asked(request)
    assert (copy.params, copy.priority) == (request.params, Priority.BULK)
    assert type(copy.priority) is Priority
    assert copy.token_ids == [5, 6]


def test_progress_comes_back() -> None:
    request, copy = Request([5], SamplingParams()), Request([5], SamplingParams())
    copy.state, copy.finish_reason = RequestState.FINISHED, FinishReason.ERROR
    copy.error, copy.finished_ns = RequestError("no", "why"), 7
    set_progress(request, progress(copy))
    assert progress(request) == progress(copy)
    assert request.is_finished
    for name in PROGRESS:
        assert getattr(request, name) == getattr(copy, name)
        assert type(getattr(request, name)) is type(getattr(copy, name))


def test_what_requests_wait_for_travels_without_classes() -> None:
    """A class or an enum costs both sides Python code, beside a model that uses the caches."""
    request = Request([5], SamplingParams())
    request.finish_reason, request.error = FinishReason.ERROR, RequestError("no", "why")
    report = StepReport([], [], [], {}, [Ended(1, [7], [], [], progress(request))], True)
    for message in (Submit([asked(request)], starts_at_once=True), report):
        data = frame(message)
        assert Frames().feed(data) == [message]
        assert b"quantgate" not in data


def test_log_probabilities_come_back() -> None:
    entries = [TokenLogprob(3, -0.25, ((3, -0.25), (4, -2.0)), (-9.0,)), TokenLogprob(4, -1.0)]
    assert token_logprobs(plain_logprobs(entries)) == entries


def test_a_front_that_reads_nothing_holds_nobody_up_and_loses_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs)
        report = StepReport([], [1] * 200, list(range(300, 500)), {}, [], counts_follow=False)
        for _ in range(3000):  # far beyond what a socket buffers
            channel.send(report)
        frames, found = Frames(), []
        ours.settimeout(10)
        while len(found) < 3000:
            ours.setblocking(False)
            try:
                found += frames.feed(ours.recv(1 << 20))
            except BlockingIOError:
                channel.receive(0)  # each look for mail also sends on
        assert found == [report] * 3000


def test_the_other_ends_end_is_noticed() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    ours.sendall(frame(Abort([1], FinishReason.ABORT)))
    assert channel.receive(1.0) == [Abort([1], FinishReason.ABORT)]
    assert channel.receive(0) == []
    assert channel.receive(0.01) == []
    ours.close()
    with pytest.raises(ChannelClosedError):
        channel.receive(None)
    theirs.close()


def test_each_reader_of_counts_has_a_copy_of_its_own() -> None:
    metrics = EngineMetrics(generation_tokens=7)
    metrics.now.service_tokens_per_s = 80.0
    counts = Counts.of(metrics)
    metrics.generation_tokens += 1
    counts.read().generation_tokens += 1
    assert counts.read().generation_tokens == 7
    assert (counts.service_tokens_per_s, counts.service_s_per_step) == (80.0, None)
