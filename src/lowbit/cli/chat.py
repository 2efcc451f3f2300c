"""`lowbit chat`: a conversation with a checkpoint, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli._options import context_options, note, note_unused_terms, sampling_options, standard_input

if TYPE_CHECKING:
    from lowbit.runtime.generate import Sampling
    from lowbit.runtime.runner import Runner

Messages = list[dict[str, str]]

_EXAMPLES = """\b
Examples:
  lowbit chat ./llama-w4 --system 'You are brief.' --temperature 0.7 --top-p 0.9
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model")
@click.option("--system", help="What the model is told before the conversation.")
@sampling_options(tokens=512, temperature=0.7, top_p=0.95)
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
    adapter: Path | None,
    trust_remote_code: bool,
    **sampling: Any,
) -> None:
    """Talk with MODEL (a directory, file or hub name); an empty line or the end of input ends it."""
    import torch

    from lowbit.errors import UsageError
    from lowbit.runtime.generate import Sampling, prepare
    from lowbit.runtime.runner import open_runner

    if threads:
        torch.set_num_threads(threads)
    note_unused_terms(model, adapter, "run")
    runner = open_runner(
        model, threads=threads, trust_remote_code=trust_remote_code, context=context, keep=kv, cache=cache,
        adapter=adapter, note=note,
    )  # fmt: skip
    messages = [{"role": "system", "content": system}] if system else []
    lines, chosen, unanswered = standard_input(), Sampling(**sampling), False
    prepare(runner, messages, chosen)
    for line in _lines(lines.isatty()):
        try:
            messages = _turn(runner, [*messages, {"role": "user", "content": line}], chosen, lines.isatty())
        except UsageError as error:  # of this message: it was no text, or is too long
            unanswered = True
            note(str(error))
    if unanswered and not lines.isatty():
        sys.exit(1)


def _turn(runner: Runner, messages: Messages, sampling: Sampling, typed: bool) -> Messages:
    """Answer the last message; the conversation with the answer, without what there is no room for."""
    from lowbit.runtime.generate import answer, fitted

    kept, parts = fitted(runner, messages, sampling), list[str]()
    if len(kept) < len(messages):
        count = len(messages) - len(kept)
        note(f"the context of {runner.limit} tokens is full: the oldest {count} messages are left out from here on")

    def show(part: str) -> None:
        parts.append(part)
        click.echo(part, nl=False)

    ended = ""
    try:
        ended = answer(runner, kept, sampling, show).ended
    except KeyboardInterrupt:  # in a terminal it ends the answer, not the conversation
        if not typed:
            raise
    click.echo()
    if ended == "context":
        note(f"the context of {runner.limit} tokens is full: the answer ends here")
    return [*kept, {"role": "assistant", "content": "".join(parts)}]


def _lines(typed: bool) -> Iterator[str]:
    """What is said, up to an empty line or the end: asked for in a terminal, where it can be edited."""
    if typed:
        with suppress(ImportError):
            import_module("readline")  # `input` edits lines with it
        click.echo("An empty line ends it; Ctrl-C ends an answer.", err=True)

    def read() -> str:
        return (input("> ") if typed else sys.stdin.readline()).strip()

    with suppress(EOFError):
        while line := read():
            yield line
