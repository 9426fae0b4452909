"""A dataclass of options, as typer and the person at the terminal see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from quantgate.cli import app
from quantgate.cli_options import split_names, takes_options


@dataclass(frozen=True, kw_only=True)
class Place:
    city: Annotated[str, typer.Argument()]
    street: Annotated[str | None, typer.Option("--street")] = None


def run(*arguments: str) -> str:
    post = typer.Typer()

    @post.command()
    @takes_options
    def send(place: Place, fast: Annotated[bool, typer.Option("--fast")] = False) -> None:
        """Send."""
        typer.echo(f"{place.city} {place.street} {fast}")

    return CliRunner().invoke(post, list(arguments)).output


def test_the_fields_of_the_dataclass_are_arguments_and_options_and_come_back_filled() -> None:
    assert run("Oslo", "--street", "Main", "--fast").strip() == "Oslo Main True"


def test_a_field_left_out_keeps_its_default_and_one_without_a_default_is_required() -> None:
    assert run("Oslo").strip() == "Oslo None False"
    assert "Missing argument" in run()


@pytest.mark.parametrize("command", ["release", "measure", "build", "audit", "drill"])
def test_every_command_that_begins_with_a_policy_takes_the_same_options(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"]).output
    for option in ("policy", "--model", "--device", "--variants", "--runs", "--json"):
        assert option in shown


def test_names_are_split_at_commas_and_no_names_are_none() -> None:
    assert split_names("bf16, int4-gptq") == ["bf16", "int4-gptq"]
    assert split_names(None) is None
