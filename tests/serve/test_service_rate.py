"""How fast a queue is worked off."""

import pytest

from quantgate_serve.service_rate import ServiceRate


def test_nothing_is_known_before_requests_have_waited() -> None:
    rate = ServiceRate()
    assert rate.tokens_per_s is None
    rate.observe(100, 0.2)
    assert rate.tokens_per_s is None
    rate.observe(100, 0.1)
    assert rate.tokens_per_s == pytest.approx(667, rel=0.02)


def test_the_pace_of_requests_is_known_from_the_first_that_ends() -> None:
    rate = ServiceRate()
    assert rate.s_per_step is None
    rate.observe_end(100, 2.0)
    assert rate.s_per_step == pytest.approx(0.02)
    for _ in range(200):
        rate.observe_end(100, 4.0)
    assert rate.s_per_step == pytest.approx(0.04, rel=0.01)


def test_no_progress_is_no_rate() -> None:
    rate = ServiceRate()
    rate.observe(0, 5.0)
    assert rate.tokens_per_s is None


def test_a_change_of_speed_is_followed_within_seconds() -> None:
    rate = ServiceRate()
    for _ in range(1000):
        rate.observe(10, 0.01)
    assert rate.tokens_per_s == pytest.approx(1000)
    for _ in range(3000):
        rate.observe(1, 0.01)
    assert rate.tokens_per_s == pytest.approx(100, rel=0.6)
