"""Where greedy answers part from the reference's: shown beside the verdicts, and judged by none."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from quantgate.measure import Binomial, Scalar
from quantgate.measurements_file import MeasurementSet
from quantgate.quality.divergence import SAME_RATE, SHARED_TOKENS


def divergence_table(measurements: MeasurementSet) -> Table | None:
    """A row per variant and golden set whose answers were generated; None without any."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("Variant", "Greedy answers of"):
        table.add_column(column, no_wrap=True)
    for column in ("The same", "Others part after"):
        table.add_column(column, justify="right", no_wrap=True)
    for variant, measured in measurements.variants.items():
        for metric, same in measured.measurements.items():
            if not metric.startswith("divergence/") or not isinstance(same, Binomial):
                continue
            name = metric.removeprefix("divergence/").removesuffix(f".{SAME_RATE}")
            shared = measured.measurements.get(f"divergence/{name}.{SHARED_TOKENS}")
            table.add_row(
                escape(variant),
                escape(name),
                f"{100 * same.events / same.trials:.1f} %",
                f"{shared.value:.0f} tokens" if isinstance(shared, Scalar) else "–",
            )
    return table if table.row_count else None
