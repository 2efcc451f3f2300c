"""`lowbit generate`: continue a prompt, or answer it, with a checkpoint in any format that is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli._options import context_options, note, note_unused_terms, sampling_options, standard_input

if TYPE_CHECKING:
    from lowbit.runtime.generate import Generated
    from lowbit.runtime.runner import Runner

_EXAMPLES = """\b
Examples:
  lowbit generate ./llama-w4 'The capital of France is'
  lowbit generate ./llama-w4 --chat --prompt 'Who are you?' --temperature 0.7 --top-p 0.9
  lowbit generate model.Q4_K_M.gguf --prompt 'Once' --max-tokens 64 --threads 8
  lowbit generate ./llama-w4 --prompt 'Once' --prompt 'Twice' --prompts more.txt --json
  lowbit generate ./llama-w4 --adapter ./lora 'Once'
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model")
@click.argument("given", metavar="[PROMPT]...", nargs=-1)
@click.option("-p", "--prompt", "prompts", multiple=True, help="Text to continue, - for standard input; repeatable.")
@click.option("--prompts", "file", type=click.Path(exists=True, dir_okay=False), help="More of them, one on each line.")
@click.option("--chat", is_flag=True, help="The prompt is a message; answer it through the model's chat template.")
@sampling_options(tokens=256, temperature=0.0, top_p=1.0)
@context_options
@click.option("--exact", is_flag=True, help="Do not round activations to int8; slower.")
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: torch's own]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document, at the end.")
def command(
    model: str,
    given: tuple[str, ...],
    prompts: tuple[str, ...],
    file: str | None,
    chat: bool,
    exact: bool,
    threads: int | None,
    context: int | None,
    kv: str,
    cache: Path | None,
    adapter: Path | None,
    trust_remote_code: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a prompt with MODEL (a directory, file or hub name), its weights multiplied as they are stored.

    Several prompts are continued at once, and printed when all have ended.
    """
    import torch

    from lowbit.runtime.generate import Sampling, answer, generate, generate_all
    from lowbit.runtime.runner import open_runner

    texts = _texts((*given, *prompts), file)
    if not texts or (chat and len(texts) > 1):
        raise click.UsageError("give a prompt" + (", and only one with --chat" if texts else " or --prompts"))
    if threads:
        torch.set_num_threads(threads)
    note_unused_terms(model, adapter, "run")
    runner = open_runner(
        model,
        exact=exact,
        threads=threads,
        trust_remote_code=trust_remote_code,
        context=context,
        keep=kv,
        cache=cache,
        adapter=adapter,
        note=note,
    )
    chosen = Sampling(**sampling)
    show = (lambda part: None) if as_json else lambda part: click.echo(part, nl=False)
    if len(texts) > 1:
        results = generate_all(runner, texts, chosen)
    elif chat:
        results = [answer(runner, [{"role": "user", "content": texts[0]}], chosen, show)]
    else:
        results = [generate(runner, texts[0], chosen, show)]
    found = [{**asdict(each), "rate": each.rate, "others": runner.others} for each in results]
    if as_json:
        click.echo(json.dumps(found if len(found) > 1 else found[0], indent=2))
        return
    for prompt, each in zip(texts, results, strict=True):
        click.echo(f"\n{prompt}\u2192{each.text}" if len(results) > 1 else "")
        _print(each, runner)


def _texts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts, before the model is opened for some that cannot be read."""
    from lowbit.runtime.words import require_text

    texts = [standard_input().read() if prompt == "-" else prompt for prompt in prompts]
    for text in texts:
        require_text(text, "the prompt")
    if file:
        lines = Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape")
        require_text(lines, file)
        texts += lines.removesuffix("\n").split("\n") if lines else []  # `splitlines` parts at a dozen characters more
    return texts


def _print(result: Generated, runner: Runner) -> None:
    left = f"; {len(runner.others)} weights not on the kernels (--json names them)" if runner.others else ""
    declared = sorted({str(each.activations) for each in runner.checkpoint.weights.values() if each.activations})
    left += f"; inputs are rounded as the kernels do, not to {', '.join(declared)}" if declared else ""
    left += f"; the context of {runner.limit} tokens is full" if result.ended == "context" else ""
    click.echo(
        f"{result.prompt_tokens} tokens read, first after {result.first:.2f} s, then {result.tokens} tokens at "
        f"{result.rate:.1f} a second; {runner.kernels} weights on the kernels{left}; decoder: {result.decoder}",
        err=True,
    )
