"""`lowbit advise`: what fits, what loads, and what to take, without running anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lowbit.cli._options import Size

if TYPE_CHECKING:
    from rich.table import Table

    from lowbit.advise import Advice

SHOWN = 12
_EPILOG = """\b
Examples:
  lowbit advise MODEL --hardware rtx-4090 --context 8192 --runtime vllm
  lowbit advise MODEL --hardware this --memory 6GiB
  lowbit advise MODEL --hardware h100 --batch 64 --max-loss 1% --measured SWEEP/sweep.json
  lowbit advise --precisions
"""


def _share(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < 10:
        raise click.BadParameter(f"{value!r} is not a share, as 1% or 0.01")
    return share


@click.command(epilog=_EPILOG)
@click.argument("model", required=False)
@click.option("--hardware", default="this", show_default=True, help="Name of a profile, or `this`: measured.")
@click.option("--context", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of each sequence.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option("--memory", type=Size(), help="Memory to use, as 12GiB, in place of what the hardware has.")
@click.option("--runtime", help="vllm, llama.cpp, transformers, onnxruntime, mlx, lowbit.  [default: all]")
@click.option("--kv", "cache", default="f16", show_default=True, help="Type of the cache, one that the runtime has.")
@click.option("--max-loss", callback=_share, help="Growth of perplexity that may not be passed, as 1%.")
@click.option(
    "--measured", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="sweep.json of this model, for --max-loss.",
)  # fmt: skip
@click.option("--precisions", is_flag=True, help="Print the table of number formats, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: str | None,
    hardware: str,
    context: int,
    batch: int,
    memory: int | None,
    runtime: str | None,
    cache: str,
    max_loss: float | None,
    measured: Path | None,
    precisions: bool,
    as_json: bool,
) -> None:
    """Say what of MODEL fits on a machine, in which schemes its runtimes load it, and which to take.

    Header and configuration are read, weights are not. Tokens/s are a bound, not a forecast.
    """
    from lowbit.advise import Question, advise, read_measured
    from lowbit.advise.hardware import find
    from lowbit.stages.checkpoint import open_checkpoint

    if precisions:
        _show_precisions(as_json)
        return
    if model is None:
        raise click.UsageError("name a MODEL, or --precisions")
    question = Question(find(hardware), context, batch, memory, runtime, cache, max_loss)
    with open_checkpoint(model) as checkpoint:
        advice = advise(checkpoint, question, read_measured(measured) if measured else None)
    if as_json:
        click.echo(json.dumps(advice.to_dict(), indent=2))
    else:
        _show(advice, model)


def _show(advice: Advice, model: str) -> None:
    from lowbit.budget import format_size
    from lowbit.cli._screen import table_console

    console, question = table_console(), advice.question
    hardware = question.hardware
    has = format_size(advice.memory) if advice.memory else "memory not told"
    features = f", {' '.join(hardware.features)}" if hardware.features else ""
    where = f"{hardware.name}: {hardware.family} ({hardware.maker}{features}), {has}"
    asked = f"{question.batch} x {question.context:,} tokens"
    rate = f"{hardware.bandwidth / 1e9:,.1f} GB/s"
    head = f"{model}: {advice.parameters:,} weights; {where}, {rate}; {asked}"
    console.print(head, markup=False, soft_wrap=True)
    console.print(_table(advice))
    for place, option in enumerate(advice.options[:3], 1):
        console.print(
            f"{place}. {option.runtime}: {option.scheme or 'as it is'}: {'; '.join(option.reasons)}", markup=False
        )
        if option.command:
            console.print(f"   lowbit quantize {model} OUT {option.command}", markup=False, soft_wrap=True)
    if len(advice.options) > SHOWN:
        console.print(f"... and {len(advice.options) - SHOWN} more: --runtime narrows, --json has them all")
    refused: dict[str, list[str]] = {}
    for option in advice.refused:
        refused.setdefault(f"{option.runtime}: {option.refused}", []).append(option.scheme or option.format)
    for reason, schemes in list(refused.items())[:SHOWN]:
        console.print(f"not {', '.join(dict.fromkeys(schemes))}; {reason}", markup=False, style="dim")
    if len(refused) > SHOWN:
        console.print(f"... and {len(refused) - SHOWN} more reasons: --json has them all")
    console.print(f"training    {advice.training}", markup=False)
    for note in advice.notes:
        console.print(f"note        {note}", markup=False)


def _table(advice: Advice) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from lowbit.budget import format_size

    columns = (
        "", "runtime", "scheme", "format", "bits", "file", "weights", "cache", "working", "all", "tokens/s at most",
    )  # fmt: skip
    table = Table(*columns, box=SIMPLE, pad_edge=False)
    for column in (table.columns[0], *table.columns[4:]):
        column.justify = "right"
    for column in table.columns[1:4]:  # names are read as a whole; figures may break between number and unit
        column.no_wrap, column.overflow = True, "fold"
    for place, option in enumerate(advice.options[:SHOWN], 1):
        sizes = (option.file, option.weights, option.cache, option.working, option.total)
        loss = f" ({option.loss.value:+.2%})" if option.loss else ""
        table.add_row(
            str(place), option.runtime, (option.scheme or "as it is") + loss, option.format, f"{option.bits:.2f}",
            *map(format_size, sizes), f"{option.bound:,.1f}",
        )  # fmt: skip
    return table


def _show_precisions(as_json: bool) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from lowbit.cli._screen import table_console
    from lowbit.stages.checkpoint import arch_rows

    rows = arch_rows("precisions")
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table("name", "bits", "exponent", "mantissa", "largest", "smallest", "hardware", box=SIMPLE, pad_edge=False)
    for row in rows:
        numbers = (f"{row[key]:g}" for key in ("bits", "exponent", "mantissa", "largest", "smallest"))
        table.add_row(row["name"], *numbers, row["hardware"])
    table_console().print(table)
