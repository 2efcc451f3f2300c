"""What options say of how a result is to run: where, in which runtime, with how many tokens of how many sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import click

if TYPE_CHECKING:
    from lowbit.stages.running import Kept, Running

CONTEXT, BATCH, KEEP = 4096, 1, "f16"
WORDS = {
    "hardware": "--hardware", "runtime": "--runtime", "run_context": "--run-context", "run_batch": "--run-batch",
    "kept": "--kv",
}  # fmt: skip


@final
@dataclass(frozen=True)
class Wanted:
    """What is asked for at run time: most bytes of memory, most seconds of one step of decoding, and where.

    `asked`: how the user said these seconds.
    """

    memory: int | None
    latency: float | None
    running: Running
    asked: str = ""


def make_wanted(asked: dict[str, Any], form: str, threads: int, sized: bool, narrow: tuple[str, ...] = ()) -> Wanted:
    """What the options of `_options.py` stand for, of which one at least was given.

    Args:
        threads: of the kernels that are measured.
        sized: whether bits or bytes of files are limited, so that the memory of the hardware is not.
        narrow: schemes of the cache that may be chosen, where the user named no type of it.
    """
    from lowbit.advise import running
    from lowbit.advise.hardware import THIS, find

    latency, memory = _seconds(asked), asked["memory"]
    name = asked["hardware"] or (THIS if latency else None)
    hardware = find(name) if name else None
    context, batch = asked["run_context"] or CONTEXT, asked["run_batch"] or BATCH
    found, usable = running(form, hardware, asked["runtime"], asked["kept"] or KEEP, context, batch)
    found = replace(found, others=() if asked["kept"] else _among(found, narrow))
    if asked["hardware"] and hardware and memory is None and not sized:
        memory = int(hardware.memory * usable) or None
        if memory is None and latency is None:
            raise click.UsageError(f"how much memory {name} has depends on the machine: say it with --memory")
    if found.runtime == "lowbit":
        found = _here(found, threads, bool(latency and hardware and hardware.name == THIS))
    elif latency and name == THIS and not asked["hardware"]:
        raise click.UsageError(
            f"the speed of {found.runtime} is not measured here: name --hardware, or --runtime lowbit"
        )
    said = f"--tokens-per-second {asked['rate']:g}" if asked["rate"] else f"--latency {1e3 * (latency or 0):.4g}ms"
    return Wanted(memory, latency, found, said)


def _among(running: Running, narrow: tuple[str, ...]) -> tuple[Kept, ...]:
    """The types of the cache that round as one of these schemes, which stands in the place of its own."""
    from lowbit.schemes import parse

    wanted = {parse(name): name for name in narrow}
    found = [replace(each, scheme=wanted[s]) for each in running.others if (s := parse(each.scheme)) in wanted]
    if narrow and not found:
        types = ", ".join(f"{each.scheme} ({each.name})" for each in running.others) or "nothing narrower"
        click.echo(
            f"lowbit: the cache stays {running.cache}: {running.runtime} has {types} for it, none of --narrow", err=True
        )
    return tuple(found)


def _seconds(asked: dict[str, Any]) -> float | None:
    """Of one step of decoding, at most."""
    if asked["latency"] and asked["rate"]:
        raise click.UsageError("--latency and --tokens-per-second say the same: name one of them")
    return asked["latency"] or (1 / asked["rate"] if asked["rate"] else None)


def _here(running: Running, threads: int, measured: bool) -> Running:
    """Our own runtime: weights are held in panels; on this machine the products are measured."""
    from lowbit.runtime.costs import held_bytes, product_timer

    timer = product_timer(threads, running.batch) if measured else None
    return replace(running, held=held_bytes, product=timer)
