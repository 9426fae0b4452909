"""The counts of a server go on when its engines do not."""

from types import SimpleNamespace
from typing import Any

from quantgate_serve.channel import Counts
from quantgate_serve.memory import peak_resident_bytes
from quantgate_serve.metrics import EngineMetrics
from quantgate_serve.tally import Tally


class _Child(SimpleNamespace):
    """As much of an engine's process as is counted."""

    __hash__ = object.__hash__


def child(*, tokens: int, peak_bytes: int, running: int = 0, device: str = "cuda") -> Any:
    metrics = EngineMetrics(generation_tokens=tokens)
    metrics.now.peak_memory_bytes, metrics.now.num_running = peak_bytes, running
    loaded = SimpleNamespace(device_type=device)
    return _Child(counts=Counts.of(metrics), loaded=loaded)


def test_counts_and_peaks_are_of_all_engines_and_the_gauges_of_the_serving_one() -> None:
    serving = child(tokens=5, peak_bytes=100, running=2)
    other = child(tokens=3, peak_bytes=40, running=9)
    total = Tally().total([serving, other], serving)
    assert (total.generation_tokens, total.now.num_running) == (8, 2)
    assert total.now.peak_memory_bytes == 140


def test_an_engine_that_is_gone_is_counted_once_and_the_peak_never_falls() -> None:
    tally = Tally()
    gone, next_one = child(tokens=5, peak_bytes=100), child(tokens=1, peak_bytes=60)
    tally.keep(gone, peak_bytes=tally.total([gone], gone).now.peak_memory_bytes)
    # Until it is taken off the list it has nothing left that could be counted again.
    total = tally.total([gone, next_one], next_one)
    assert (total.generation_tokens, total.now.peak_memory_bytes) == (6, 100)
    assert tally.total([], None).generation_tokens == 5


def test_on_a_cpu_the_memory_of_this_process_is_part_of_the_peak() -> None:
    serving = child(tokens=0, peak_bytes=100, device="cpu")
    before = peak_resident_bytes()
    assert Tally().total([serving], serving).now.peak_memory_bytes >= before + 100


def test_without_any_engine_nothing_is_counted() -> None:
    assert Tally().total([], None) == EngineMetrics()
