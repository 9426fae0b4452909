"""The commands that measure and judge: release and its stages, audit, drill, judge, record."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantgate.cli_options import (
    SERVING,
    JsonOption,
    PolicyOptions,
    RunArgument,
    ServingOption,
    TrackingOption,
    open_console,
    print_result,
    progress_shown,
    release_folder,
    split_names,
    takes_options,
)

if TYPE_CHECKING:
    from quantgate.release import ReleaseResult

release_app = typer.Typer()


@release_app.command()
@takes_options
def release(
    options: PolicyOptions,
    serving_config: ServingOption = SERVING,
    record: Annotated[bool, typer.Option(help="Record the verdicts in MLflow.")] = True,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build, serve, measure, judge and record every variant of a policy.

    Example: quantgate release gates/policies/demo.cpu.yaml
    """
    from quantgate.release import judge_stored, measure_release

    with progress_shown() as progress:
        folder = measure_release(options.request(serving_config), progress)
        progress.stage("judge")
        result = judge_stored(folder)
        if record:
            from quantgate.record import record_release

            progress.stage("record")
            record_release(folder, tracking_uri=tracking_uri)
    _print_verdicts(result, as_json=as_json)


@release_app.command()
@takes_options
def measure(
    options: PolicyOptions, serving_config: ServingOption = SERVING, as_json: JsonOption = False
) -> None:
    """Build, serve and measure, without judging: for a GPU machine whose results CI judges.

    Example: quantgate measure gates/policies/demo.cpu.yaml --device cuda:0
    """
    from quantgate.release import measure_release

    with progress_shown() as progress:
        folder = measure_release(options.request(serving_config), progress)
    print_result({"release": str(folder.path)}, f"measured: {folder.path}", as_json=as_json)


@release_app.command()
@takes_options
def build(options: PolicyOptions, as_json: JsonOption = False) -> None:
    """Build the variants of a policy, or find them built, and print where they lie.

    Example: quantgate build gates/policies/demo.cpu.yaml --variants bf16,int4-gptq
    """
    from quantgate.release import build_variants

    with progress_shown() as progress:
        built = build_variants(options.request(), progress)
    value = {
        name: {"folder": str(v.folder), "artifact_sha256": v.manifest.artifact_sha256}
        for name, v in built.items()
    }
    text = "\n".join(
        f"{name:12} {v.manifest.artifact_sha256[:12]}  {v.folder}" for name, v in built.items()
    )
    print_result(value, text, as_json=as_json)


@release_app.command()
@takes_options
def audit(options: PolicyOptions, as_json: JsonOption = False) -> None:
    """Compare every stored weight with the source's, by independent code; needs no data.

    Builds the variants, or finds them built, and judges the policy's gates on audit/… metrics.
    Example: quantgate audit gates/policies/demo.cpu.yaml --variants int4-gptq
    """
    from quantgate.measurements_file import to_json
    from quantgate.release import audit_variants_of
    from quantgate.report.table import audit_report
    from quantgate.verdict import exit_code

    with progress_shown() as progress:
        judged = audit_variants_of(options.request(), progress)
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
        open_console().print(audit_report(judged))
    raise typer.Exit(code)


@release_app.command()
@takes_options
def drill(
    options: PolicyOptions,
    faults: Annotated[
        str | None, typer.Option("--faults", help="Plant only these, comma-separated.")
    ] = None,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Go on through every layer after a catch.")
    ] = False,
    record: Annotated[bool, typer.Option(help="Record the drill in MLflow.")] = True,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow store; default: runs/mlflow.db.")
    ] = None,
    serving_config: ServingOption = SERVING,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table, a column per variant.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Plant known faults into copies of a policy's variants: which would its gates let through?

    Exit code 0 only if every harmful fault was caught, and every harmless change judged and none
    blocked; 3 if nothing is wrong but a harmless change was not judged, or no fault planted.
    Example: quantgate drill gates/policies/demo.cpu.yaml --variants int4-gptq
    """
    from quantgate.drill.runner import DrillRequest, run_drill
    from quantgate.report.drill import drill_markdown, drill_report

    request = DrillRequest(
        release=options.request(serving_config),
        faults=split_names(faults),
        all_layers=all_layers,
    )
    with progress_shown() as progress:
        result, path = run_drill(request, progress)
        if record:
            from quantgate.record_drill import record_drill

            progress.stage("record")
            record_drill(path, result, tracking_uri=tracking_uri)
    if as_json:
        typer.echo(path.read_text(encoding="utf-8"))
    elif as_markdown:
        typer.echo(drill_markdown(result), nl=False)
    else:
        open_console().print(drill_report(result, path=path))
    raise typer.Exit(result.exit_code)


@release_app.command()
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
    result = judge_stored(release_folder(run), policy=other)
    _print_verdicts(result, as_json=as_json, other_policy=str(policy) if policy else None)


@release_app.command()
def record(
    run: RunArgument, tracking_uri: TrackingOption = None, as_json: JsonOption = False
) -> None:
    """Record a judged release in MLflow; recording twice finds the first record.

    Example: quantgate record runs/demo.cpu-20261124-101500
    """
    from quantgate.record import record_release

    recorded = record_release(release_folder(run), tracking_uri=tracking_uri)
    value = {
        "tracking_uri": recorded.tracking_uri,
        "experiment": recorded.experiment,
        "run_id": recorded.run_id,
        "variant_run_ids": dict(recorded.variant_run_ids),
    }
    text = f"recorded: run {recorded.run_id} in {recorded.experiment}\nNext: quantgate ui"
    print_result(value, text, as_json=as_json)


def _print_verdicts(
    result: ReleaseResult, *, as_json: bool, other_policy: str | None = None
) -> None:
    from quantgate.measurements_file import read_measurements
    from quantgate.report.divergence import divergence_table
    from quantgate.report.table import release_report
    from quantgate.verdict import exit_code
    from quantgate.verdicts_file import verdicts_json

    code = exit_code(outcome for decision in result.decisions for outcome in decision.outcomes)
    run = result.folder.path
    shown = os.path.relpath(run) if run.is_absolute() else str(run)
    if as_json:
        value = verdicts_json(result.verdicts)
        typer.echo(json.dumps(value | {"release": shown, "exit_code": code}, indent=2))
    else:
        divergence = divergence_table(read_measurements(result.folder.measurements))
        report = release_report(
            result.decisions, run=shown, divergence=divergence, other_policy=other_policy
        )
        open_console().print(report)
    raise typer.Exit(code)
