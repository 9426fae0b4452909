"""What several commands take alike, and how they print."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from quantgate.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from quantgate.console import ConsoleProgress
    from quantgate.plan import ReleaseRequest
    from quantgate.release_folder import ReleaseFolder

RUNS = Path("runs")
SERVING = Path("serve/serving.yaml")

RunArgument = Annotated[Path, typer.Argument(help="Release folder, runs/<release-id>.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where releases are kept.")]
ServingOption = Annotated[
    Path, typer.Option("--serving-config", help="The serving config to read or change.")
]
TrackingOption = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow store; default: runs/mlflow.db.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What every command takes that begins with a policy."""

    policy: Annotated[Path, typer.Argument(help="Policy file, gates/policies/*.yaml.")]
    model: Annotated[
        str | None, typer.Option("--model", help="Source model: demo, a folder or a hub id.")
    ] = None
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda:N.")] = None
    variants: Annotated[
        str | None, typer.Option("--variants", help="Judge only these, comma-separated.")
    ] = None
    runs: RunsOption = RUNS

    def request(self, serving_config: Path = SERVING) -> ReleaseRequest:
        from quantgate.plan import ReleaseRequest
        from quantgate.policy import load_policy

        return ReleaseRequest(
            policy=load_policy(self.policy),
            runs=self.runs,
            serving_config=serving_config,
            model=self.model,
            device=self.device,
            variants=split_names(self.variants),
        )


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Shows typer the fields of each parameter that is a dataclass, in that parameter's place.

    The command itself receives the dataclass, filled.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint
            shown += _field_parameters(hint)
        else:
            shown.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            values[name] = group(**{field: values.pop(field) for field in fields})
        command(**values)

    call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return call


def _field_parameters(group: type[Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        has_default = field.default is not dataclasses.MISSING
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=field.default if has_default else inspect.Parameter.empty,
        )


def split_names(names: str | None) -> list[str] | None:
    """Comma-separated names; None for none given."""
    return [name.strip() for name in names.split(",")] if names else None


def release_folder(run: Path) -> ReleaseFolder:
    """The release that a person names.

    Raises:
        UsageError: there is none.
    """
    from quantgate.release_folder import ReleaseFolder

    if not run.is_dir():
        raise UsageError(f"{run}: no such release folder; quantgate status lists the newest.")
    resolved = run.resolve()
    return ReleaseFolder(runs=resolved.parent, release_id=resolved.name)


def open_console() -> Console:
    from rich.console import Console

    # A log has no width: the table must not be cut at eighty columns there.
    return Console() if sys.stdout.isatty() else Console(width=160)


@contextmanager
def progress_shown() -> Iterator[ConsoleProgress]:
    """Progress goes to stderr, so that --json leaves stdout to the result."""
    from rich.console import Console

    from quantgate.console import ConsoleProgress

    progress = ConsoleProgress(Console(stderr=True))
    try:
        yield progress
    finally:
        progress.close()


def print_result(value: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Prints one result: `value` for programs, or `text` for people."""
    if as_json:
        typer.echo(json.dumps(value, indent=2))
    else:
        open_console().print(text, highlight=False, markup=False)
