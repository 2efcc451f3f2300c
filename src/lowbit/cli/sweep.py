"""`lowbit sweep`: many points, measured on one text, and the frontier of quality against size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli._options import listed, make_rules, progress_bars, rules_options, run_options

if TYPE_CHECKING:
    from lowbit.stages.sweep_report import SweepRecord

_EPILOG = """\b
Examples:
  lowbit sweep MODEL SWEEP --schemes int3-g64,int4-g128,int8-row --evaluate wiki.txt
  lowbit sweep MODEL SWEEP --schemes gguf:q3_k_m,gguf:q4_k_m,int4-g128 --evaluate wiki.txt --time
  lowbit sweep MODEL SWEEP --schemes int3-g64,int4-g128 --methods rtn,gptq --calibration train.txt --evaluate test.txt
"""


@click.command(epilog=_EPILOG)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--schemes", required=True, callback=listed, metavar="A,B", help="Schemes, or FORMAT:SCHEME.")
@click.option("--methods", callback=listed, metavar="X,Y", help="Methods or recipes.  [default: the format's own]")
@rules_options
@run_options
@click.option("--time", "timed", is_flag=True, help="Time decoding of each point on this machine.")
@click.option("--keep", is_flag=True, help="Keep the quantized models, in OUT/models.")
@click.option("--json", "as_json", is_flag=True, help="Print sweep.json.")
def command(
    model: str,
    out: Path,
    schemes: tuple[str, ...],
    methods: tuple[str, ...],
    plan_file: Path | None,
    timed: bool,
    keep: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL with every one of --schemes and --methods, measure each on the same text, and compare.

    OUT/sweep.html shows quality against size with intervals, what is dominated, the knee, and a point for each kind of
    user. Points that are done are not run again: the same command goes on, one with more schemes adds to it.
    """
    from lowbit.pipeline import Request
    from lowbit.sweep import SweepRequest, sweep

    if plan_file or options["scheme"] or options["method"]:
        raise click.UsageError("a sweep takes --schemes and --methods, in place of --scheme, --method and --plan")
    rules = make_rules(options)
    request = SweepRequest(Request(model, out, rules, **options), schemes, methods, keep, timed)

    def announce(name: str, number: int, total: int, done: bool) -> None:
        click.echo(f"point {number} of {total}: {name}{', done before' if done else ''}", err=True)

    with progress_bars() as progress:
        record = sweep(request, progress, announce)
    if as_json:
        click.echo(json.dumps(record.to_dict(), indent=1))
    else:
        _show(record)
        click.echo(f"report: {(out / 'sweep.html').resolve()}")


def _show(record: SweepRecord) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from lowbit.budget import format_size
    from lowbit.cli._screen import table_console
    from lowbit.stages._frontier import USERS

    console = table_console()
    table = Table(
        "point", "size", "bits", "KL divergence", "95% interval", "beside the others", box=SIMPLE, pad_edge=False
    )
    bend = record.knee
    for each in record.judged:
        point, kl = each.point, each.point.divergence
        surely = ", beyond the intervals" if each.surely else ""
        beside = f"dominated by {each.dominated}{surely}" if each.dominated else "on the frontier"
        beside += ", the knee" if bend and bend.name == point.name else ""
        sizes = (format_size(point.bytes), f"{point.bits:.3f}", f"{kl.value:.4g}", f"{kl.low:.4g} to {kl.high:.4g}")
        table.add_row(point.name, *sizes, beside)
    console.print(table)
    for user, point in record.recommended.items():
        quality, size, speed = USERS[user]
        console.print(f"{user}: {point.name} (weights: quality {quality}, size {size}, speed {speed})", markup=False)
    for left in record.skipped:
        console.print(f"left out: {left.name}: {left.reason}", markup=False, style="dim")
    if not record.timed:
        console.print("speed was not measured: its weight counts for the size (--time measures it)")
