"""The command line: one file per command, imported only when that command runs."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from importlib import import_module
from typing import final

import click

from lowbit import __version__

_COMMANDS = {
    "quantize": "Quantize a checkpoint, verify it, measure it, report.",
    "convert": "Take a checkpoint into another format, lossless where it holds the weights.",
    "plan": "Show which tensor would get which scheme, and why.",
    "advise": "Say what fits on a machine, what its runtimes load, and what to take.",
    "sweep": "Measure many schemes and methods, and draw quality against size.",
    "imatrix": "Write llama.cpp's importance matrix of a model.",
    "evaluate": "Perplexity, and divergence from a reference, with intervals.",
    "generate": "Continue a prompt, the weights multiplied as they are stored.",
    "chat": "The same as a conversation.",
    "bench": "How fast a checkpoint runs here: load, prefill, decode, memory.",
    "inspect": "Tell what a checkpoint is and whether it is sound.",
    "demo": "Take the embedded model through the whole line.",
}
# Those that write what a later call goes on with.
_KEEPING = {"quantize", "convert", "sweep", "demo"}


@final
class _Lazy(click.Group):
    """Knows its commands by name and one line; imports the file of the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"lowbit.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(
    cls=_Lazy,
    commands={name: click.Command(name) for name in _COMMANDS},  # what click suggests for a name that is none
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="lowbit")
def group() -> None:
    """Model checkpoints in fewer bits: quantized, verified, measured.

    \b
    lowbit demo                                      the embedded model, start to report
    lowbit quantize MODEL OUT --scheme int4-g128     one command for a checkpoint of yours
    lowbit quantize --help                           schemes, methods, formats, limits
    """


def main() -> None:
    """Entry point: errors of ours end in one sentence and their exit code, never in a traceback."""
    from lowbit.errors import LowbitError

    _print_any_letter()
    _leave_out()
    try:
        group(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        kept = _KEEPING.intersection(sys.argv[1:2])
        _fail("stopped" + ("; what is finished is kept: the same command goes on" if kept else ""), 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except LowbitError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:  # of a pipe that was closed click ends without a word
        _let_go()
        # Files that are written say what they are called; a full disk is beneath standard output, if beneath none.
        where = error.filename or ("standard output" if error.errno == errno.ENOSPC else "")
        _fail(f"{where}: {error.strerror}" if where else str(error), 1)


def _print_any_letter() -> None:
    """What standard output has no letter for becomes `?`: when it is printed the work is done."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _leave_out() -> None:
    """Warnings as torchao is imported, which transformers does wherever it is installed: no command uses it."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _let_go() -> None:
    """Of what standard output does not take: Python would try again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(text: str, code: int) -> None:
    click.echo(f"lowbit: {' '.join(text.split())}", err=True)
    sys.exit(code)
