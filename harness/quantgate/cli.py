"""The command line: which commands there are, and which exit code an error becomes.

The commands parse, print, and turn results into exit codes; they decide nothing.

Exit codes: 0 all pass · 1 a gate failed or a promotion was refused · 2 wrong usage or configuration
· 3 no trustworthy verdict (INVALID) · 4 inconclusive · 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from quantgate import __version__
from quantgate.cli_golden import golden_app
from quantgate.cli_release import release_app
from quantgate.cli_serving import serving_app
from quantgate.errors import QuantgateError, UsageError

app = typer.Typer(
    name="quantgate",
    help="Decides whether a quantized model may replace the one that is serving now.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Without a name, their commands stand beside each other: quantgate release, quantgate promote.
app.add_typer(release_app)
app.add_typer(serving_app)
app.add_typer(golden_app, name="golden")


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


if __name__ == "__main__":
    main()
