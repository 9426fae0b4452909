"""The commands about what serves: promote, rollback, status, serve, and the record's UI."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantgate.cli_options import (
    RUNS,
    SERVING,
    JsonOption,
    RunArgument,
    RunsOption,
    ServingOption,
    print_result,
    release_folder,
)
from quantgate.errors import UsageError

if TYPE_CHECKING:
    from quantgate.promote import Change
    from quantgate_serve.config import ServedVariant

serving_app = typer.Typer()

ReasonOption = Annotated[str, typer.Option("--reason", help="Kept in the audit log.")]


@serving_app.command()
def promote(
    run: RunArgument,
    variant: Annotated[str, typer.Option("--variant", help="An approved variant.")],
    serving_config: ServingOption = SERVING,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write an approved variant into the serving config.

    Example: quantgate promote runs/demo.cpu-20261124-101500 --variant bf16
    """
    from quantgate import promote as promotion

    change = promotion.promote(
        release_folder(run), variant, serving_config=serving_config, reason=reason
    )
    _print_change(change, serving_config, next_line="Next: quantgate serve", as_json=as_json)


@serving_app.command()
def rollback(
    serving_config: ServingOption = SERVING,
    reason: ReasonOption = "",
    allow_none: Annotated[
        bool, typer.Option("--allow-none", help="Also when nothing served before.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the previous variant the champion again.

    Example: quantgate rollback --reason "p95 rose after promotion"
    """
    from quantgate import promote as promotion

    change = promotion.rollback(serving_config, reason=reason, allow_none=allow_none)
    _print_change(change, serving_config, next_line="", as_json=as_json)


@serving_app.command()
def status(
    serving_config: ServingOption = SERVING,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Say what serves, what served before, and the newest releases.

    Example: quantgate status
    """
    from quantgate.promote import is_audit_complete, read_audit
    from quantgate.release_folder import releases
    from quantgate_serve.config import read_serving_config

    config = read_serving_config(serving_config) if serving_config.is_file() else None
    entries = read_audit(serving_config)
    newest = [
        {"release": folder.release_id, "stage": folder.read_state()["stage"]}
        for folder in list(releases(runs))[:5]
    ]
    champion = config.champion if config else None
    previous = config.previous if config else None
    value = {
        "champion": champion.model_dump(mode="json") if champion else None,
        "previous": previous.model_dump(mode="json") if previous else None,
        "changes": len(entries),
        "is_audit_complete": is_audit_complete(serving_config),
        "releases": newest,
    }
    lines = [
        f"champion  {_served(champion)}",
        f"previous  {_served(previous)}",
        f"changes   {len(entries)}, the audit log "
        + ("agrees" if value["is_audit_complete"] else "DOES NOT AGREE with the serving config"),
        *(f"release   {entry['release']}  {entry['stage']}" for entry in newest),
    ]
    print_result(value, "\n".join(lines), as_json=as_json)


@serving_app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(
    context: typer.Context,
    serving_config: ServingOption = SERVING,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
) -> None:
    """Serve exactly the champion of the serving config; every file is checked first.

    Further options go to the server: python -m quantgate_serve --help lists them.
    Example: quantgate serve --port 8000
    """
    command = [
        *(sys.executable, "-m", "quantgate_serve", "--config", str(serving_config)),
        *("--host", host, "--port", str(port), "--device", device, *context.args),
    ]
    # The server takes this process's place, so that signals reach it directly.
    os.execv(sys.executable, command)


@serving_app.command()
def ui(
    runs: RunsOption = RUNS,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
) -> None:
    """Open the record in the MLflow UI.

    Example: quantgate ui --port 5000
    """
    from quantgate.record import ui_page
    from quantgate.record_store import embedded_uri

    if not (runs / "mlflow.db").is_file():
        raise UsageError(f"{runs}/mlflow.db: nothing is recorded yet. Write: quantgate release …")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    command = [
        *(sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", embedded_uri(runs)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    typer.echo(f"http://127.0.0.1:{port}/{ui_page(runs)}")
    os.execv(sys.executable, command)


def _print_change(change: Change, path: Path, *, next_line: str, as_json: bool) -> None:
    value = {"action": change.action, "before": change.before, "after": change.after}
    text = f"{path}: champion {change.before or 'none'} → {change.after or 'none'}"
    print_result(value, "\n".join(filter(None, (text, next_line))), as_json=as_json)


def _served(variant: ServedVariant | None) -> str:
    if variant is None:
        return "none"
    return f"{variant.name}  {variant.artifact_sha256[:12]}  {variant.release}"
