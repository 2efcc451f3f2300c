"""`lowbit inspect`: what a checkpoint is, how it was made, and whether it is sound."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from lowbit.cli._options import progress_bars

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from lowbit.inspect.facts import Finding, Inspection

SHOWN = 20


@click.command(epilog="Example: lowbit inspect MODEL --json | jq .totals")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, with every tensor.")
def command(path: str, as_json: bool) -> None:
    """Tell what the checkpoint at PATH is, who made it, and whether its values are sound.

    Format, scheme of each tensor, bits per weight, what stayed unquantized; NaN, Inf, scales that are zero, codes off
    the grid. Every weight is read, one at a time. Exit code 1: something is wrong with it.
    """
    from lowbit.inspect import inspect

    with progress_bars() as progress:
        found = inspect(path, progress)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)
    sys.exit(0 if found.sound else 1)


def _print(found: Inspection) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for line in _head(found):
        console.print(line, markup=False)
    console.print(_table(found))
    errors = [finding for finding in found.findings if finding.level == "error"]
    for finding in [*errors, *(finding for finding in found.findings if finding.level == "note")][:SHOWN]:
        console.print(_line(finding), markup=False)
    if len(found.findings) > SHOWN:
        console.print(f"... and {len(found.findings) - SHOWN} more: lowbit inspect --json has them all")
    verdict = f"not sound: {len(errors)} errors" if errors else "sound: every value finite, every code on its grid"
    console.print(verdict, style="bold red" if errors else "bold green")


def _line(finding: Finding) -> str:
    return f"{finding.level}: {finding.tensor + ': ' if finding.tensor else ''}{finding.fact}"


def _head(found: Inspection) -> Iterator[str]:
    from lowbit.budget import format_size

    kinds = [found.model.get("model_type"), *(found.model.get("architectures") or [])]
    size, count = format_size(sum(found.files.values())), len(found.files)
    yield f"{found.path}: {' '.join(map(str, filter(None, kinds))) or 'no config.json'}"
    yield f"container   {found.container}, {count} file{'s' * (count != 1)}, {size}"
    yield f"format      {found.format or 'float, not quantized'}"
    methods = sorted({facts.method for facts in found.tensors if facts.method})
    if methods:
        yield f"method      {', '.join(methods)}"
    if found.made_by:
        yield f"made by     {', '.join(f'{tool} {detail}' for tool, detail in found.made_by.items())}"
    for alias, name in found.tied.items():
        yield f"tied        {alias} = {name}"
    parameters = sum(facts.parameters for facts in found.stored)
    bits = f"{found.bits_per_weight(quantized=False):.4f} over all {parameters:,} weights"
    if found.format:
        bits = f"{found.bits_per_weight(quantized=True):.4f} per quantized weight, {bits}"
    yield f"bits        {bits}"


def _table(found: Inspection) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from lowbit.budget import format_size

    table = Table("kind", "scheme", "tensors", "weights", "stored", "bits each", box=SIMPLE, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for group in found.groups():
        counts = (f"{group.tensors:,}", f"{group.parameters:,}", format_size(group.stored))
        table.add_row(group.kind, group.scheme or "as it is", *counts, f"{group.bits_per_weight:.4f}")
    return table
