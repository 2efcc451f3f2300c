"""`lowbit bench`: how fast a checkpoint runs on this machine, and where the time goes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lowbit.cli._options import kept_options, note

if TYPE_CHECKING:
    from lowbit.runtime.bench import Bench

_EXAMPLES = """\b
Examples:
  lowbit bench ./llama-w4 --threads 8
  lowbit bench model.Q4_K_M.gguf --prompt-tokens 512 --tokens 128 --explain
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model")
@click.option("--prompt-tokens", type=click.IntRange(1), default=256, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to decode after it.")
@kept_options
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: torch's own]")
@click.option("--explain", is_flag=True, help="Each kind of product by itself: bytes, time, share of memory's speed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def command(
    model: str,
    prompt_tokens: int,
    tokens: int,
    kv: str,
    cache: Path | None,
    threads: int | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Measure MODEL (a directory, file or hub name): load, prefill, decode, memory."""
    import torch

    from lowbit.runtime.bench import bench

    if threads:
        torch.set_num_threads(threads)
    found = bench(model, prompt_tokens, tokens, threads, kv, cache, note)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(found, explain)


def _reading(found: Bench) -> str:
    """How fast weights are read, beside a plain loop that reads."""
    from lowbit.budget import format_size

    near = "; they stay in the processor's cache, which is faster than memory" if found.cached else ""
    return f"{format_size(found.bytes)}, {found.share:.0%} of the {found.read / 1e9:.1f} GB/s that memory gives{near}"


def _print(found: Bench, explain: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from lowbit.budget import format_size

    console = Console()
    rows = {
        "load": f"{found.load:.2f} s",
        f"prefill, {found.prompt} tokens": f"{found.prefill:.1f} tokens/s, first token after {found.first:.3f} s",
        f"decode, {found.tokens} tokens": f"{found.decode:.1f} tokens/s",
        "decoder": found.decoder,
        "weights of a token" if found.decoder == "native" else "weights on the kernels": _reading(found),
        "memory": f"{format_size(found.memory)}, {format_size(found.kept)} of them for keys and values",
        "kernels": f"{found.isa}, {found.threads} threads; {found.others} weights not on them",
    }
    table = Table(show_header=False)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    if explain:
        kinds = Table("product", "weights", "bytes", "time", "GB/s", "share", title=f"by kind, one token, {found.isa}")
        for each in found.kernels:
            rate = f"{each.bytes / each.seconds / 1e9:.1f}"
            name = f"{each.bits} bits, {each.way}"
            kinds.add_row(
                name,
                str(each.weights),
                format_size(each.bytes),
                f"{1000 * each.seconds:.2f} ms",
                rate,
                f"{each.share:.0%}",
            )
        console.print(kinds)
