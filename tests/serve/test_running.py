"""Who has a seat, and who gives it up first."""

from quantgate_serve.request import Priority, Request, SamplingParams
from quantgate_serve.running import RunningRequests


def request_of(priority: Priority) -> Request:
    return Request([1], SamplingParams(max_tokens=1), priority=priority)


def test_the_newest_of_the_least_urgent_is_the_last() -> None:
    running = RunningRequests()
    assert running.last is None
    bulk, urgent, later_bulk = map(request_of, (Priority.BULK, Priority.INTERACTIVE, Priority.BULK))
    for request in (bulk, urgent, later_bulk):
        running.seat(request)
    assert running.requests == [urgent, bulk, later_bulk]
    assert len(running) == 3
    assert running.last is later_bulk
    running.remove(later_bulk)
    assert running.last is bulk


def test_who_returns_has_its_old_place_again() -> None:
    running = RunningRequests()
    first, second, third = (request_of(Priority.NORMAL) for _ in range(3))
    for request in (first, second):
        running.seat(request)
    running.remove(first)
    running.seat(third)
    running.seat(first)
    assert running.requests == [first, second, third]


def test_only_lower_classes_may_be_interrupted_by_the_level_they_run_at() -> None:
    running = RunningRequests()
    aged, bulk, normal = map(request_of, (Priority.BULK, Priority.BULK, Priority.NORMAL))
    aged.level = Priority.INTERACTIVE
    for request in (aged, bulk, normal):
        running.seat(request)
    assert running.less_urgent(Priority.INTERACTIVE) == [normal, bulk]
    assert running.less_urgent(Priority.NORMAL) == [bulk]
    assert running.less_urgent(Priority.BULK) == []
