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
