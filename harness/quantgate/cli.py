"""The command line: parses, prints, and turns results into exit codes; it decides nothing.

Exit codes: 0 all pass · 1 a gate failed or a promotion was refused · 2 wrong usage or configuration
· 3 no trustworthy verdict (INVALID) · 4 inconclusive · 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantgate import __version__
from quantgate.cli_golden import golden_app
from quantgate.errors import QuantgateError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from quantgate.console import ConsoleProgress
    from quantgate.plan import ReleaseRequest
    from quantgate.release import ReleaseResult
    from quantgate.release_folder import ReleaseFolder

app = typer.Typer(
    name="quantgate",
    help="Decides whether a quantized model may replace the one that is serving now.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(golden_app, name="golden")

PolicyArgument = Annotated[Path, typer.Argument(help="Policy file, gates/policies/*.yaml.")]
RunArgument = Annotated[Path, typer.Argument(help="Release folder, runs/<release-id>.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Source model: demo, a folder or a hub id.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda:N.")]
VariantsOption = Annotated[
    str | None, typer.Option("--variants", help="Judge only these, comma-separated.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where releases are kept.")]
ServingOption = Annotated[
    Path, typer.Option("--serving-config", help="The serving config to read or change.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Kept in the audit log.")]

RUNS = Path("runs")
SERVING = Path("serve/serving.yaml")


@app.command()
def release(
    policy: PolicyArgument,
    model: ModelOption = None,
    device: DeviceOption = None,
    variants: VariantsOption = None,
    runs: RunsOption = RUNS,
    serving_config: ServingOption = SERVING,
    record: Annotated[bool, typer.Option(help="Record the verdicts in MLflow.")] = True,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow store; default: runs/mlflow.db.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build, serve, measure, judge and record every variant of a policy.

    Example: quantgate release gates/policies/demo.cpu.yaml
    """
    from quantgate.release import judge_stored, measure_release

    console, progress = _progress()
    request = _request(policy, model, device, variants, runs, serving_config)
    try:
        folder = measure_release(request, progress)
        progress.stage("judge")
        result = judge_stored(folder)
        if record:
            from quantgate.record import record_release

            progress.stage("record")
            record_release(folder, tracking_uri=tracking_uri)
    finally:
        progress.close()
    _print_result(console, result, as_json=as_json)


@app.command()
def measure(
    policy: PolicyArgument,
    model: ModelOption = None,
    device: DeviceOption = None,
    variants: VariantsOption = None,
    runs: RunsOption = RUNS,
    serving_config: ServingOption = SERVING,
    as_json: JsonOption = False,
) -> None:
    """Build, serve and measure, without judging: for a GPU machine whose results CI judges.

    Example: quantgate measure gates/policies/demo.cpu.yaml --device cuda:0
    """
    from quantgate.release import measure_release

    console, progress = _progress()
    try:
        folder = measure_release(
            _request(policy, model, device, variants, runs, serving_config), progress
        )
    finally:
        progress.close()
    _print(console, {"release": str(folder.path)}, f"measured: {folder.path}", as_json=as_json)


@app.command()
def build(
    policy: PolicyArgument,
    model: ModelOption = None,
    device: DeviceOption = None,
    variants: VariantsOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Build the variants of a policy, or find them built, and print where they lie.

    Example: quantgate build gates/policies/demo.cpu.yaml --variants bf16,int4-gptq
    """
    from quantgate.release import build_variants

    console, progress = _progress()
    try:
        built = build_variants(_request(policy, model, device, variants, runs, SERVING), progress)
    finally:
        progress.close()
    value = {
        name: {"folder": str(v.folder), "artifact_sha256": v.manifest.artifact_sha256}
        for name, v in built.items()
    }
    text = "\n".join(
        f"{name:12} {v.manifest.artifact_sha256[:12]}  {v.folder}" for name, v in built.items()
    )
    _print(console, value, text, as_json=as_json)


@app.command()
def audit(
    policy: PolicyArgument,
    model: ModelOption = None,
    device: DeviceOption = None,
    variants: VariantsOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Compare every stored weight with the source's, by independent code; needs no data.

    Builds the variants, or finds them built, and judges the policy's gates on audit/… metrics.
    Example: quantgate audit gates/policies/demo.cpu.yaml --variants int4-gptq
    """
    from quantgate.measurements_file import to_json
    from quantgate.release import audit_variants_of
    from quantgate.report.table import audit_report
    from quantgate.verdict import exit_code

    console, progress = _progress()
    try:
        judged = audit_variants_of(
            _request(policy, model, device, variants, runs, SERVING), progress
        )
    finally:
        progress.close()
    code = exit_code(verdict.outcome for one in judged for verdict in one.verdicts)
    if as_json:
        value = {
            one.variant: {
                "report": str(one.report) if one.report else None,
                "measurements": [to_json(measurement) for measurement in one.measurements],
                "verdicts": [{"gate": v.gate_id, "outcome": v.outcome} for v in one.verdicts],
            }
            for one in judged
        }
        typer.echo(json.dumps(value | {"exit_code": code}, indent=2))
    else:
        console.print(audit_report(judged))
    raise typer.Exit(code)


@app.command()
def drill(
    policy: PolicyArgument,
    model: ModelOption = None,
    device: DeviceOption = None,
    variants: VariantsOption = None,
    faults: Annotated[
        str | None, typer.Option("--faults", help="Plant only these, comma-separated.")
    ] = None,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Go on through every layer after a catch.")
    ] = False,
    runs: RunsOption = RUNS,
    serving_config: ServingOption = SERVING,
    as_json: JsonOption = False,
) -> None:
    """Plant known faults into copies of a policy's variants: which would its gates let through?

    Exit code 0 only if every harmful fault was caught and no harmless change was blocked.
    Example: quantgate drill gates/policies/demo.cpu.yaml --variants int4-gptq
    """
    from quantgate.drill.runner import DrillRequest, run_drill
    from quantgate.report.drill import drill_report

    console, progress = _progress()
    request = DrillRequest(
        release=_request(policy, model, device, variants, runs, serving_config),
        faults=[name.strip() for name in faults.split(",")] if faults else None,
        all_layers=all_layers,
    )
    try:
        result, path = run_drill(request, progress)
    finally:
        progress.close()
    if as_json:
        typer.echo(path.read_text(encoding="utf-8"))
    else:
        console.print(drill_report(result, path=path))
    raise typer.Exit(0 if result.is_clean else 1)


@app.command()
def judge(
    run: RunArgument,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Another policy; verdicts.json stays as it is.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge stored measurements again; needs no model, no GPU and no torch.

    Example: quantgate judge runs/demo.cpu-20261124-101500
    """
    from quantgate.policy import load_policy
    from quantgate.release import judge_stored

    other = load_policy(policy) if policy else None
    _print_result(_console(), judge_stored(_folder(run), policy=other), as_json=as_json)


@app.command("record")
def record_command(
    run: RunArgument,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow store; default: runs/mlflow.db.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Record a judged release in MLflow; recording twice finds the first record.

    Example: quantgate record runs/demo.cpu-20261124-101500
    """
    from quantgate.record import record_release

    recorded = record_release(_folder(run), tracking_uri=tracking_uri)
    value = {
        "tracking_uri": recorded.tracking_uri,
        "experiment": recorded.experiment,
        "run_id": recorded.run_id,
        "variant_run_ids": dict(recorded.variant_run_ids),
    }
    _print(_console(), value, f"recorded: run {recorded.run_id} in {recorded.experiment}\n"
           "Next: quantgate ui", as_json=as_json)  # fmt: skip


@app.command()
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

    change = promotion.promote(_folder(run), variant, serving_config=serving_config, reason=reason)
    _print_change(change, serving_config, "Next: quantgate serve", as_json=as_json)


@app.command()
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
    _print_change(change, serving_config, "", as_json=as_json)


@app.command()
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
    _print(_console(), value, "\n".join(lines), as_json=as_json)


@app.command(
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


@app.command()
def ui(
    runs: RunsOption = RUNS,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
) -> None:
    """Open the record in the MLflow UI.

    Example: quantgate ui --port 5000
    """
    from quantgate.record import embedded_uri

    if not (runs / "mlflow.db").is_file():
        raise UsageError(f"{runs}/mlflow.db: nothing is recorded yet. Write: quantgate release …")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    command = [
        *(sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", embedded_uri(runs)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    typer.echo(f"http://127.0.0.1:{port}")
    os.execv(sys.executable, command)


@app.callback(invoke_without_command=True)
def _main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Runs a command; every error a person can cause is one message and an exit code."""
    from quantgate.errors import ArtifactError, MeasurementError
    from quantgate_serve.config import ConfigError

    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except _Interrupted:
        typer.echo("interrupted; the same command goes on where this one stopped", err=True)
        sys.exit(130)
    except (UsageError, ConfigError) as error:
        _fail(error, 2)
    except (ArtifactError, MeasurementError) as error:
        _fail(error, 3)
    except QuantgateError as error:
        _fail(error, 1)
    except OSError as error:
        # A full disk or a folder that cannot be written: no half file is left behind.
        _fail(error, 3)


class _Interrupted(BaseException):
    """Ctrl-C; typer would turn a KeyboardInterrupt into exit code 1, which says a gate failed."""


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise _Interrupted


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"quantgate: {error}", err=True)
    sys.exit(code)


def _request(
    policy: Path,
    model: str | None,
    device: str | None,
    variants: str | None,
    runs: Path,
    serving_config: Path,
) -> ReleaseRequest:
    from quantgate.plan import ReleaseRequest
    from quantgate.policy import load_policy

    return ReleaseRequest(
        policy=load_policy(policy),
        runs=runs,
        serving_config=serving_config,
        model=model,
        device=device,
        variants=[name.strip() for name in variants.split(",")] if variants else None,
    )


def _folder(run: Path) -> ReleaseFolder:
    from quantgate.release_folder import ReleaseFolder

    if not run.is_dir():
        raise UsageError(f"{run}: no such release folder; quantgate status lists the newest.")
    resolved = run.resolve()
    return ReleaseFolder(runs=resolved.parent, release_id=resolved.name)


def _console() -> Console:
    from rich.console import Console

    # A log has no width: the table must not be cut at eighty columns there.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _progress() -> tuple[Console, ConsoleProgress]:
    from rich.console import Console

    from quantgate.console import ConsoleProgress

    # Progress goes to stderr, so that --json leaves stdout to the result.
    return _console(), ConsoleProgress(Console(stderr=True))


def _print_result(console: Console, result: ReleaseResult, *, as_json: bool) -> None:
    from quantgate.report.table import release_report
    from quantgate.verdict import exit_code

    code = exit_code(outcome for decision in result.decisions for outcome in decision.outcomes)
    run = result.folder.path
    shown = os.path.relpath(run) if run.is_absolute() else str(run)
    if as_json:
        value: dict[str, Any] = json.loads(result.folder.verdicts.read_text(encoding="utf-8"))
        typer.echo(json.dumps(value | {"release": shown, "exit_code": code}, indent=2))
    else:
        console.print(release_report(result.decisions, run=shown))
    raise typer.Exit(code)


def _print_change(change: Any, path: Path, next_line: str, *, as_json: bool) -> None:
    value = {"action": change.action, "before": change.before, "after": change.after}
    text = f"{path}: champion {change.before or 'none'} → {change.after or 'none'}"
    _print(_console(), value, "\n".join(filter(None, (text, next_line))), as_json=as_json)


def _print(console: Console, value: Any, text: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value, indent=2))
    else:
        console.print(text, highlight=False, markup=False)


def _served(variant: Any) -> str:
    if variant is None:
        return "none"
    return f"{variant.name}  {variant.artifact_sha256[:12]}  {variant.release}"


if __name__ == "__main__":
    main()
