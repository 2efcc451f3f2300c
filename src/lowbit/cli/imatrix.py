"""`lowbit imatrix`: what `llama-imatrix` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lowbit.cli._options import Size, progress_bars, seed

_EXAMPLES = """\b
Examples:
  lowbit imatrix ./llama imatrix.gguf --calibration wiki.txt
  lowbit quantize ./llama ./out --format gguf --scheme q4_k_m --imatrix imatrix.gguf
  llama-quantize --imatrix imatrix.gguf llama-f16.gguf llama-q4_k_m.gguf q4_k_m
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--calibration", "sources", multiple=True, required=True, metavar="TEXT",
    help="Text to run: FILE, FILE.jsonl[:FIELD] or hf:NAME[:CONFIG[:SPLIT[:FIELD]]]; repeatable.",
)  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Windows of that text.")
@click.option(
    "--sequence-length", "length", type=click.IntRange(8), default=512, show_default=True, help="Tokens per window."
)
@click.option(
    "--sampling", type=click.Choice(["random", "stratified", "length", "first"]), default="random",
    show_default=True, help="How windows are chosen.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, callback=seed, help="Of every choice at random.")
@click.option("--ram", type=Size(), help="Anonymous memory that the run may hold, as 4GiB; checked first, then kept.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
def command(model: str, out: Path, ram: int | None, trust_remote_code: bool, **text: Any) -> None:
    """Write the importance matrix of MODEL into the file OUT, for llama-quantize or for lowbit quantize --imatrix.

    For each weight of the blocks the sum of squares of every input and the number of rows, of the float model, in one
    block at a time.
    """
    from lowbit.pipeline import run_imatrix
    from lowbit.stages.plan import Calibration

    with progress_bars() as progress:
        run_imatrix(
            model, out, Calibration(**text), progress, trust_remote_code, ram,
            lambda cost: click.echo(f"memory: at most {cost}", err=True),
        )  # fmt: skip
    click.echo(f"{out}: importance matrix; use it with lowbit quantize --format gguf --imatrix, or llama-quantize")
