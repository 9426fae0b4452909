"""What the engine's side of the socket says to its front, and in which order it takes mail."""

from collections.abc import Callable
from typing import Any

import pytest

from quantgate_serve.channel import (
    Abort,
    Counts,
    Message,
    StepReport,
    Stop,
    Submit,
    asked,
)
from quantgate_serve.engine import Engine
from quantgate_serve.engine_host import EngineHost
from quantgate_serve.request import FinishReason, Request

MakeEngine = Callable[..., Engine]
MakeRequest = Callable[..., Request]


class Front:
    """Sends one batch of messages after another, each when the engine owes nothing."""

    def __init__(self, *mail: list[Message]) -> None:
        self._mail = list(mail)
        self.heard: list[Message] = []

    def receive(self, timeout_s: float | None) -> list[Message]:
        if timeout_s is not None:
            return []
        return self._mail.pop(0) if self._mail else [Stop()]

    def send(self, message: Message) -> None:
        self.heard.append(message)

    @property
    def reports(self) -> list[StepReport]:
        return [message for message in self.heard if isinstance(message, StepReport)]


def test_a_request_for_an_idle_engine_is_counted_at_its_end_and_not_beside_its_steps(
    make_engine: MakeEngine, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow this machine is.
    monkeypatch.setattr("quantgate_serve.engine_host.COUNTS_INTERVAL_S", 10.0)
    monkeypatch.setattr("quantgate_serve.engine._GAUGES_EVERY_NS", 10**10)
    mail: list[list[Message]] = [[Submit([asked(make_request([5], max_tokens=9))])] for _ in "ab"]
    front: Any = Front(*mail)
    engine = make_engine()
    gauged: list[bool] = []
    update = engine.update_gauges

    def update_gauges() -> None:
        gauged.append(engine.has_work)
        update()

    engine.update_gauges = update_gauges  # type: ignore[method-assign]
    EngineHost(engine, front).run()
    kinds = [type(message) for message in front.heard]
    assert kinds == [StepReport, StepReport, Counts] * 2
    assert gauged == [False] * 2


def test_long_work_is_counted_while_it_lasts(
    make_engine: MakeEngine, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantgate_serve.engine_host.COUNTS_INTERVAL_S", 0.0)
    front: Any = Front([Submit([asked(make_request([5], max_tokens=4))])])
    EngineHost(make_engine(), front).run()
    assert sum(isinstance(message, Counts) for message in front.heard) == 4


def heard_of(engine: Engine, *mail: list[Message]) -> list[StepReport]:
    front: Any = Front(*mail)
    EngineHost(engine, front).run()
    reports: list[StepReport] = front.reports
    return reports


def test_what_the_front_counts_as_started_is_heard_of_at_its_end_alone(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    request = make_request([5, 6, 7], max_tokens=4)
    (report,) = heard_of(make_engine(), [Submit([asked(request)], starts_at_once=True)])
    assert (report.started, [ended.id for ended in report.ended]) == ([], [request.id])
    assert report.counts_follow


def test_of_every_other_request_the_start_is_told(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    first, second = make_request([5, 6], max_tokens=4), make_request([7], max_tokens=4)
    mail: list[Message] = [Submit([asked(first)], starts_at_once=True), Submit([asked(second)])]
    assert [report.started for report in heard_of(make_engine(), mail)] == [[second.id], []]


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_prompts_log_probabilities_are_told_once_with_its_first_token(
    make_engine: MakeEngine, make_request: MakeRequest, max_tokens: int
) -> None:
    request = make_request([5, 6, 7], max_tokens=max_tokens, prompt_logprobs=True, num_logprobs=0)
    request.is_streaming = True
    reports = heard_of(make_engine(), [Submit([asked(request)])])
    told = [
        [*report.prompt_logprobs.values(), *(ended.prompt_logprobs for ended in report.ended)]
        for report in reports
    ]
    (first,), *others = told
    assert [token for token, *_ in first] == [6, 7]
    assert [found for one in others for found in one if found] == []


def test_an_abort_before_the_first_step_leaves_nothing_behind(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    gone, after = make_request([5]), make_request([6], max_tokens=2)
    reports = heard_of(
        make_engine(),
        [Submit([asked(gone)], starts_at_once=True), Abort([gone.id], FinishReason.ABORT)],
        [Submit([asked(after)])],
    )
    assert [report.started for report in reports] == [[], [after.id], []]


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_queue_that_is_full_only_until_the_next_step_refuses_nobody(
    make_engine: MakeEngine, make_request: MakeRequest, max_tokens: int
) -> None:
    """Also where that step leaves the engine without work."""
    alone = make_request([3], max_tokens=max_tokens)
    stays, leaves = make_request([4], max_tokens=3), make_request([5], max_tokens=3)
    mail: list[Message] = [
        Submit([asked(alone)], starts_at_once=True),
        Submit([asked(stays), asked(leaves)]),
        Abort([leaves.id], FinishReason.ABORT),
    ]
    reports = heard_of(make_engine(max_queued_requests=2), mail)
    tokens = {ended.id: len(ended.tokens) for report in reports for ended in report.ended}
    assert tokens == {alone.id: max_tokens, stays.id: 3, leaves.id: 0}


def test_a_queue_that_is_full_refuses_with_an_error(
    make_engine: MakeEngine, make_request: MakeRequest
) -> None:
    engine = make_engine(max_queued_requests=2)
    mail: list[Message] = [
        Submit([asked(make_request([i + 3])) for i in range(2)]),
        Submit([asked(make_request([9]))]),
    ]
    ended = [one for report in heard_of(engine, mail) for one in report.ended]
    assert sorted(len(one.tokens) for one in ended) == [0, 12, 12]
