"""`lowbit convert`: from one format into another."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit import plugins
from lowbit.cli._options import Size, cores, format_name, note, progress_bars
from lowbit.collector import paused

if TYPE_CHECKING:
    from lowbit.stages.convert import Converted

_FEW_LETTERS = 40
_EPILOG = """\b
Lossless: dequantized weights are equal to the bit, and codes are carried over, never quantized again. Where that
cannot be, it says which weights, why, and by how much, and ends with exit code 2 before anything is written.

\b
Examples:
  lowbit convert ./llama-gptq ./llama-ct --format compressed-tensors
  lowbit convert ./llama-nf4 ./llama-int4 --format gptq --lossy
  lowbit convert ./llama-gptq ./llama-f32 --format float --scheme f32
"""


@click.command(epilog=_EPILOG)
@click.argument("model", metavar="IN")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", required=True, metavar="F", callback=format_name,
    help=f"One of {', '.join(name.replace('_', '-') for name in plugins.written())}; or float, dequantized.",
)  # fmt: skip
@click.option("--scheme", metavar="S", help="Of every quantized weight, as int4-g128; with float: f16, bf16 or f32.")
@click.option(
    "--lossy", is_flag=True, help="Where the format does not hold a weight, quantize it again as near as it can."
)
@click.option("--ram", type=Size(), help="Anonymous memory that the run may hold, as 4GiB; checked first, then kept.")
@click.option("--threads", type=click.IntRange(1), default=cores, show_default="all cores", help="Workers.")
@click.option(
    "--shard-size", "shard_bytes", type=Size(), show_default="5GB, or one file of gguf", help="Largest output file."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one JSON document.")
def command(model: str, out: Path, form: str, scheme: str | None, lossy: bool, as_json: bool, **options: Any) -> None:
    """Convert IN (a directory, file or hub name) into another format, in the directory OUT.

    Killed at any moment, the same command goes on where it was. Everything written is read back and compared.
    """
    with paused(freeze=True):
        from lowbit.pipeline import run_conversion, without_tokenizer
        from lowbit.stages._changes import Goal

    def announce(planned: Converted, way: Any) -> None:
        if not as_json:
            _print(planned)
        click.echo(f"memory: at most {way}", err=True)

    with progress_bars() as progress:
        goal = Goal(form, scheme, lossy)
        done = run_conversion(model, out, goal, progress=progress, announce=announce, note=note, **options)
    click.echo(json.dumps(asdict(done), indent=2) if as_json else _summary(done))
    note(without_tokenizer(model, out))


def _print(planned: Converted) -> None:
    """What will be done, as a table, and whether it is lossless; reasons of many words are said once, below."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("weights", overflow="fold"), "from", "to", "how", "error", "why")
    long = list(dict.fromkeys(group.note for group in planned.groups if len(group.note) > _FEW_LETTERS))
    for group in planned.groups:
        name = group.name if group.tensors == 1 else f"{group.tensors} x {group.name}"
        error = "" if group.lossless else f"{group.error:.3g}"
        note = f"({long.index(group.note) + 1})" if group.note in long else group.note
        table.add_row(name, group.before or "", group.after or "", group.method or "copy", error, note)
    console = Console(stderr=True)
    console.print(table)
    for number, reason in enumerate(long, 1):
        console.print(f"({number}) {reason}", highlight=False, markup=False, soft_wrap=True)
    verdict = "lossless: every weight stays as it is, to the bit" if planned.lossless else "NOT lossless"
    console.print(f"{planned.source[1] or 'float'} -> {planned.format}: {verdict}", highlight=False)


def _summary(done: Converted) -> str:
    from lowbit.budget import format_size
    from lowbit.stages import _words as words

    lost = [group for group in done.groups if not group.lossless]
    changed = sum(group.tensors for group in lost)
    lines = [
        f"{done.path}: {done.format}, {'lossless' if done.lossless else f'{changed} weights changed'}",
        f"largest difference: {words.short(done.largest) if done.largest else '0'}"
        + ("" if done.lossless else f"; relative squared error of a weight: {words.short(done.error)} at most"),
        f"bytes of weights: {format_size(done.before)} before, {format_size(done.after)} after",
    ]
    if any(group.before for group in done.groups):
        before, after = done.bits
        lines.append(f"bits per quantized weight: {words.bits(before)} before, {words.bits(after)} after")
    else:
        lines.append("nothing in it is quantized: `lowbit quantize` does that")
    return "\n".join([*lines, f"{done.verified} weights read back and compared"])
