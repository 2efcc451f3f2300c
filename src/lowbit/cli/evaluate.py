"""`lowbit evaluate`: perplexity, and divergence from a reference, with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli._options import Size, note_unused_terms, progress_bars, seed

if TYPE_CHECKING:
    from lowbit.stages.evaluate import Evaluation

_EXAMPLES = """\b
Examples:
  lowbit evaluate ./llama-w4 --text wiki.txt --reference ./llama
  lowbit evaluate ./llama --text wiki.txt --context 2048 --stride 512 --tokens 100000
  lowbit evaluate ./llama-w4 --text wiki.txt --reference ./llama --ram 4GiB --json > scores.json
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 file to evaluate on.")
@click.option("--reference", metavar="ORIGINAL", help="Checkpoint to compare with, on the same tokens.")
@click.option("--adapter", type=click.Path(path_type=Path), help="Low-rank terms to add to MODEL, as OUT/adapter.")
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens per window.")
@click.option("--stride", type=click.IntRange(1), help="Tokens between windows' begins.  [default: context]")
@click.option("--tokens", type=click.IntRange(1), help="Use at most this many tokens of the text.")
@click.option("--ram", type=Size(), help="Anonymous memory allowed, as 4GiB; models that do not fit are streamed.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of weights and computation.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.  [default: torch's own]")
@click.option(
    "--seed", type=int, default=0, show_default=True, callback=seed, help="Of the bootstrap and the permutation test."
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
@click.option("--json", "as_json", is_flag=True, help="Print the evaluation as one JSON document.")
def command(model: str, text: Path, as_json: bool, dtype: str, **options: Any) -> None:
    """Score MODEL (a directory, file or hub name) on a text, alone or against the original.

    Perplexity with its 95% interval; against a reference, on the same tokens: KL divergence, top-1 agreement, and the
    change of log-perplexity with its interval and p-value.
    """
    import torch

    from lowbit.stages.evaluate import evaluate

    unused = note_unused_terms(model, options["adapter"], "scored")
    with progress_bars() as progress:
        result = evaluate(
            model, text, dtype=getattr(torch, dtype), progress=progress,
            announce=lambda way: click.echo(f"memory: at most {way}", err=True), **options,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        _print(result, unused)


def _print(result: Evaluation, unused: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("score", "value", "95% interval", "p-value", title=result.model, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, score in result.scores.items():
        interval = "" if score.low is None or score.high is None else f"{score.low:.6g} to {score.high:.6g}"
        p_value = "" if score.p_value is None else f"{score.p_value:.2g}"
        table.add_row(name.replace("_", " "), f"{score.value:.6g}", interval, p_value)
    console = Console()
    console.print(table)
    console.print(f"on {result.conditions}", highlight=False)
    if result.reference:
        console.print(f"reference: {result.reference}; KL divergence in nats per token", highlight=False)
    if unused:
        console.print(unused, highlight=False, soft_wrap=True)
