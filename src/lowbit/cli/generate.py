"""`lowbit generate`: continue a prompt, or answer it, with a checkpoint in any format that is read."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lowbit.runtime.generate import Generated
    from lowbit.runtime.model import Loaded

_EXAMPLES = """\b
Examples:
  lowbit generate ./llama-w4 --prompt 'The capital of France is'
  lowbit generate ./llama-w4 --chat --prompt 'Who are you?' --temperature 0.7 --top-p 0.9
  lowbit generate model.Q4_K_M.gguf --prompt 'Once' --max-tokens 64 --threads 8
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model")
@click.option("--prompt", required=True, help="Text to continue; - reads it from the standard input.")
@click.option("--chat", is_flag=True, help="The prompt is a message; answer it through the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Most tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: the likeliest token.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Only among so many.  [default: all]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Only among this probability.")
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, help="Only those this share of the likeliest.")
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, help="Above 1: less of it.")
@click.option("--stop", multiple=True, help="End after this string; may be given again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choices.")
@click.option("--exact", is_flag=True, help="Do not round activations to int8; slower.")
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: torch's own]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document, at the end.")
def command(
    model: str,
    prompt: str,
    chat: bool,
    exact: bool,
    threads: int | None,
    trust_remote_code: bool,
    as_json: bool,
    max_tokens: int,
    **sampling: Any,
) -> None:
    """Continue a prompt with MODEL (a directory, file or hub name), its weights multiplied as they are stored."""
    import torch

    from lowbit.runtime.generate import Sampling, answer, generate
    from lowbit.runtime.model import open_model

    text = sys.stdin.read() if prompt == "-" else prompt
    if threads:
        torch.set_num_threads(threads)
    loaded = open_model(model, exact=exact, threads=threads, trust_remote_code=trust_remote_code)
    chosen = Sampling(tokens=max_tokens, **sampling)
    show = (lambda part: None) if as_json else lambda part: click.echo(part, nl=False)
    if chat:
        result = answer(loaded, [{"role": "user", "content": text}], chosen, show)
    else:
        result = generate(loaded, text, chosen, show)
    if as_json:
        click.echo(json.dumps({**asdict(result), "rate": result.rate, "others": loaded.others}, indent=2))
    else:
        _print(result, loaded)


def _print(result: Generated, loaded: Loaded) -> None:
    left = f"; {len(loaded.others)} weights not on the kernels (--json names them)" if loaded.others else ""
    click.echo()
    click.echo(
        f"{result.prompt_tokens} tokens read, first after {result.first:.2f} s, then {result.tokens} tokens at "
        f"{result.rate:.1f} a second; {len(loaded.kernels)} weights on the kernels{left}; decoder: {result.decoder}",
        err=True,
    )
