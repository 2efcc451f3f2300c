"""`lowbit chat`: a conversation with a checkpoint, in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from lowbit.cli._options import context_options

_EXAMPLES = """\b
Examples:
  lowbit chat ./llama-w4 --system 'You are brief.' --temperature 0.7 --top-p 0.9
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model")
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Most tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0: the likeliest token.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choices.")
@context_options
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: torch's own]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
def command(
    model: str,
    system: str | None,
    threads: int | None,
    context: int | None,
    kv: str,
    cache: Path | None,
    trust_remote_code: bool,
    max_tokens: int,
    **sampling: Any,
) -> None:
    """Talk with MODEL (a directory, file or hub name); an empty line or the end of input ends it."""
    import torch

    from lowbit.runtime.generate import Sampling, answer
    from lowbit.runtime.runner import open_runner

    if threads:
        torch.set_num_threads(threads)
    runner = open_runner(
        model, threads=threads, trust_remote_code=trust_remote_code, context=context, keep=kv, cache=cache
    )
    messages = [{"role": "system", "content": system}] if system else []
    chosen = Sampling(tokens=max_tokens, **sampling)
    for line in sys.stdin:
        if not line.strip():
            break
        messages.append({"role": "user", "content": line.strip()})
        said = answer(runner, messages, chosen, lambda part: click.echo(part, nl=False))
        click.echo()
        messages.append({"role": "assistant", "content": said.text})
