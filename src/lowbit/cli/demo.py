"""`lowbit demo`: the embedded model through the whole line, ending with a report to open."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import click

from lowbit.cli._options import cores, print_plan, progress_bars


@click.command(epilog="Example: lowbit demo && xdg-open lowbit-demo/report.html")
@click.argument("out", type=click.Path(path_type=Path), default="lowbit-demo")
@click.option("--scheme", default="int4-g128", show_default=True, help="Scheme to show.")
@click.option("--method", default="mse", show_default=True, help="Method to show.")
def command(out: Path, scheme: str, method: str) -> None:
    """Quantize the embedded 8M-parameter model into OUT, verify it, evaluate it, and write the report."""
    from lowbit.pipeline import Request, run
    from lowbit.stages.plan import Rules

    data = files("lowbit").joinpath("data")
    with as_file(data) as folder, progress_bars() as progress:
        request = Request(
            str(folder / "wiki-8m"),
            out,
            Rules(scheme, method),
            ram=2**30,
            threads=cores(),
            text=folder / "evaluation.txt",
            context=256,
            command=f"lowbit demo {out} --scheme {scheme} --method {method}",
        )
        run(request, progress, lambda plan, way: print_plan(plan, err=True))
    click.echo((out / "report.md").read_text(), nl=False)
    click.echo(f"Open {(out / 'report.html').resolve()}")
