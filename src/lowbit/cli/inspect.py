"""`lowbit inspect`: what a checkpoint is, how it was made, and whether it is sound."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lowbit.cli._options import progress_bars

if TYPE_CHECKING:
    from lowbit.inspect.names import Name

_EPILOG = """\b
Examples:
  lowbit inspect MODEL --json | jq .totals
  lowbit inspect MODEL --original FLOAT_MODEL
  lowbit inspect --name TheBloke/Llama-2-13B-GPTQ-4bit-128g
"""


@click.command(epilog=_EPILOG)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, with every tensor.")
@click.option("--original", metavar="MODEL", help="What it was made from: weights are compared.")
@click.option("--name", "name_only", is_flag=True, help="Say what the name PATH tells, and open nothing.")
def command(path: str, as_json: bool, original: str | None, name_only: bool) -> None:
    """Tell what the checkpoint at PATH is, who made it, and whether its values are sound.

    Format, scheme of each tensor, bits per weight, what stayed unquantized; NaN, Inf, scales that are zero, codes off
    the grid; where its name says something else. Every weight is read, one at a time. Exit code 1: something is wrong
    with it; 2: there is nothing at PATH, and only the name was read, if it tells something.
    """
    from lowbit.cli._screen import show
    from lowbit.errors import UsageError
    from lowbit.inspect import inspect
    from lowbit.inspect.names import decode

    name = decode(path)
    if name_only:
        _show_name(name, as_json)
        sys.exit(0)
    try:
        with progress_bars() as progress:
            found = inspect(path, progress, original)
    except UsageError as error:
        if not name.telling or Path(path).expanduser().exists():
            raise
        _show_name(name, as_json)
        raise UsageError(f"nothing was opened, this is what the name says: {error}") from None
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)
    sys.exit(0 if found.sound else 1)


def _show_name(name: Name, as_json: bool) -> None:
    """The name alone; the document says that nothing was opened."""
    from lowbit.cli._screen import name_lines

    if as_json:
        click.echo(json.dumps({"opened": False, "name": name.to_dict()}, indent=2))
        return
    for line in [*name_lines(name), *(f"warning: {text}" for text in name.warnings)]:
        click.echo(line)
