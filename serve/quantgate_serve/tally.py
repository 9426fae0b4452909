"""What all engines of one server have counted, those that are gone included."""

from collections.abc import Sequence

from quantgate_serve.channel import Counts
from quantgate_serve.engine_child import EngineChild
from quantgate_serve.memory import peak_resident_bytes
from quantgate_serve.metrics import EngineMetrics


class Tally:
    """Counts that go on when an engine is replaced or dies."""

    def __init__(self) -> None:
        # What engines that are gone had counted.
        self._before = EngineMetrics()

    def total(self, children: Sequence[EngineChild], serving: EngineChild | None) -> EngineMetrics:
        """A copy of the sums over `children` and those before them, with the gauges of `serving`.

        The peak is in bytes: of all devices together, or with this process's own on a CPU; the
        greatest so far.
        """
        counted = {child: child.counts.read() for child in children}
        total = EngineMetrics() if serving is None else counted[serving]
        peak = sum(metrics.now.peak_memory_bytes for metrics in counted.values())
        for child, metrics in counted.items():
            if child is not serving:
                total.add(metrics)
        total.add(self._before)
        if any(child.loaded and child.loaded.device_type == "cpu" for child in children):
            peak += peak_resident_bytes()
        total.now.peak_memory_bytes = max(peak, self._before.now.peak_memory_bytes)
        return total

    def keep(self, child: EngineChild, *, peak_bytes: int) -> None:
        """Take over what `child` had counted, which ends; it counts from nothing afterwards."""
        self._before.add(child.counts.read())
        self._before.now.peak_memory_bytes = peak_bytes
        child.counts = Counts.of(EngineMetrics())
