"""Counts: what an observation adds, what travels, what survives a restart."""

import pickle

from quantgate_serve.metrics import WAIT_S, EngineMetrics, FrontMetrics, Histogram


def test_a_value_at_a_bound_belongs_to_that_bucket_and_one_above_to_the_next() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.0001, 2.0, 2.0001):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]


def test_an_observation_with_a_count_is_that_many_observations() -> None:
    once, many = Histogram(WAIT_S), Histogram(WAIT_S)
    once.observe(0.25, 3)
    for _ in range(3):
        many.observe(0.25)
    assert (once.counts, once.sum) == (many.counts, many.sum)


def test_waits_are_kept_by_priority_with_buckets_from_1_ms_to_10_s() -> None:
    metrics = EngineMetrics()
    metrics.observe_wait("bulk", 0.0009)
    metrics.observe_wait("interactive", 9.0)
    assert sorted(metrics.queue_time_s) == ["bulk", "interactive"]
    assert metrics.queue_time_s["bulk"].counts[0] == 1
    assert {0.001, 10.0} <= set(metrics.queue_time_s["bulk"].bounds)


def test_counts_travel_as_a_pickle_of_a_few_kilobytes() -> None:
    metrics = EngineMetrics(generation_tokens=5)
    metrics.observe_wait("normal", 0.1)
    metrics.now.num_waiting = {"normal": 2}
    data = pickle.dumps(metrics)
    arrived = pickle.loads(data)
    assert (arrived.generation_tokens, arrived.now.num_waiting) == (5, {"normal": 2})
    assert arrived.queue_time_s["normal"].counts == metrics.queue_time_s["normal"].counts
    assert len(data) < 8_000
    assert pickle.loads(pickle.dumps(FrontMetrics())) == FrontMetrics()


def test_a_new_engine_goes_on_counting_where_the_dead_one_stopped() -> None:
    dead, fresh = EngineMetrics(oom=2, prefix_hits=7), EngineMetrics(oom=1)
    dead.finished["stop"] = 4
    fresh.finished["abort"] = 1
    dead.step_s.observe(0.5)
    fresh.step_s.observe(0.25)
    dead.observe_wait("bulk", 1.0)
    dead.now.num_running = 9
    fresh.add(dead)
    assert (fresh.oom, fresh.prefix_hits, fresh.step_s.sum) == (3, 7, 0.75)
    assert fresh.finished == {"stop": 4, "abort": 1}
    assert sum(fresh.queue_time_s["bulk"].counts) == 1
    assert fresh.now.num_running == 0, "a gauge is of this engine alone"


def test_what_neither_engine_has_stays_absent() -> None:
    metrics = EngineMetrics()
    metrics.add(EngineMetrics())
    assert metrics.prefix_queries is None
