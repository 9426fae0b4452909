"""`quantgate golden`: the commands about golden sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

golden_app = typer.Typer(help="Golden sets: lock them, check them.", no_args_is_help=True)


@golden_app.command("lock")
def golden_lock(
    folder: Annotated[Path, typer.Argument(help="Golden set, golden_sets/<name>.")],
    model: Annotated[str, typer.Option("--model", help="Model whose tokenizer renders it.")],
) -> None:
    """Lock a golden set as it is now: from here on, any change makes its verdicts INVALID.

    Example: quantgate golden lock golden_sets/order-extract --model demo
    """
    from quantgate.quality.golden import load_golden_set
    from quantgate.quality.lock import write_lock
    from quantgate.quality.rendering import Renderer
    from quantgate.variants.source import open_source

    golden = load_golden_set(folder)
    source = open_source(model)
    renderer = Renderer(source.folder)
    rendering = renderer.describe(golden, renderer.render(golden))
    path = write_lock(golden, rendering, model=source.name)
    typer.echo(f"locked {len(golden.items)} items: {path}")


@golden_app.command("check")
def golden_check(
    folder: Annotated[Path, typer.Argument(help="Golden set, golden_sets/<name>.")],
    model: Annotated[str, typer.Option("--model", help="Model whose tokenizer renders it.")],
) -> None:
    """Compare a golden set with its lock; exit code 3 when it changed.

    Example: quantgate golden check golden_sets/order-extract --model demo
    """
    from quantgate.quality.golden import load_golden_set
    from quantgate.quality.lock import changes_since_lock, read_lock
    from quantgate.quality.rendering import Renderer
    from quantgate.variants.source import open_source

    golden = load_golden_set(folder)
    renderer = Renderer(open_source(model).folder)
    rendering = renderer.describe(golden, renderer.render(golden))
    changes = changes_since_lock(golden, rendering, read_lock(folder))
    if changes:
        typer.echo(f"{folder}: differs from its lock in {', '.join(changes)}", err=True)
        raise typer.Exit(3)
    typer.echo(f"{folder}: {len(golden.items)} items, unchanged")


@golden_app.command("stats")
def golden_stats(
    folder: Annotated[Path, typer.Argument(help="Golden set, golden_sets/<name>.")],
    margin: Annotated[float, typer.Option(help="The drop to be shown, in pt.", min=0.01)] = 2.0,
    confidence: Annotated[float, typer.Option(help="Of one tail.", min=0.51, max=0.999)] = 0.95,
    power: Annotated[float, typer.Option(help="Of passing without a drop.", max=0.999)] = 0.8,
) -> None:
    """Say which margin a golden set can resolve, and how many items are missing for one.

    Example: quantgate golden stats golden_sets/order-extract --margin 2
    """
    from collections import Counter

    from quantgate.quality.golden import load_golden_set
    from quantgate.quality.scoring import BINARY_SCORERS
    from quantgate.statistics import binomial, clusters, noninferiority

    golden = load_golden_set(folder)
    n, share = len(golden.items), margin / 100
    sizes = list(Counter(item.cluster for item in golden.items).values())
    typer.echo(f"{golden.name}: {n:,} items in {len(sizes):,} clusters")
    for tag, count in sorted(golden.tag_counts().items()):
        typer.echo(f"  {tag}: {count:,} items")
    for spec in golden.task.metric_list:
        typer.echo(f"{spec.metric}, {confidence:.3g} confidence, {power:.3g} power:")
        if spec.metric in BINARY_SCORERS:
            for flips in (0.01, 0.02, 0.05, 0.1):
                found = noninferiority.resolvable_margin(
                    flips, n, confidence=confidence, power=power
                )
                needed = noninferiority.planned_items(
                    flips, share, confidence=confidence, power=power
                )
                typer.echo(
                    f"  {flips:.0%} of items differ: resolves {100 * found:.2f} pt; "
                    f"{margin:g} pt needs {needed:,} items, {_missing(needed - n)}"
                )
        else:
            effective = clusters.num_effective(sizes)
            best = binomial.upper_bound(0, effective, confidence=confidence)
            needed = binomial.trials_without_event(share, confidence=confidence)
            typer.echo(
                f"  without any difference: resolves {100 * best:.2f} pt; {margin:g} pt needs "
                f"{needed:,} equal clusters, and these weigh like {effective:.0f}; "
                f"{_missing(needed - int(effective))}"
            )


def _missing(count: int) -> str:
    return "none missing" if count <= 0 else f"{count:,} missing"
