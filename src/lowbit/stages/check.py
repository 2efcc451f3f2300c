"""Check: what single decisions of a plan really cost, where the prediction was nearly undecided between two schemes.

The divergence of the model with the weights of one decision quantized, and nothing else (leave-one-in): all cases run
through the blocks side by side, one block in memory at a time, from the block in which they differ from the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lowbit.blocks import CPU
from lowbit.stages._blocks import Entrance, Exit, LiveBlock
from lowbit.stages.quantize import one_torch_thread
from lowbit.stages.sensitivity import (
    Run,
    chances,
    divergence,
    jobs_of,
    live_block,
    made_by,
    pieces_of,
    replaced,
    see,
    sites_of,
)
from lowbit.stages.write import allocate


@final
@dataclass(frozen=True)
class Case:
    """Weights that are replaced together, and the scheme on offer that they get."""

    names: tuple[str, ...]
    scheme: str


@torch.no_grad()
def check(run: Run, cases: Sequence[Case]) -> list[float]:
    """The divergence of each case from the original, nats per token."""
    paths, ends = list(run.blueprint.blocks), [_ends(run, case) for case in cases]
    states = [_started(run, number, end[0]) for number, end in enumerate(ends)]
    for index, path in enumerate(paths):
        run.progress("check", index, len(paths))
        run.watch.check()
        _through(run, path, index, cases, states)
    found = _divergences(run, [end[1] for end in ends], states)
    run.progress("check", len(paths), len(paths))
    return found


def _ends(run: Run, case: Case) -> tuple[Entrance | None, Exit | None]:
    """What stands before and after the blocks of a case, where it is not the original's."""
    inside = frozenset[str]().union(*run.blueprint.blocks.values())
    entries = [run.offers[name][case.scheme] for name in case.names if name not in inside]
    if not entries:
        return None, None
    blueprint = replaced(run, entries)
    entrance = Entrance(blueprint, CPU)
    return entrance, Exit(blueprint, entrance, run.windows.ids[run.held])


def _started(run: Run, number: int, entrance: Entrance | None) -> Tensor | None:
    """Room for the hidden states of a case that differs before the first block, with them in it."""
    if entrance is None:
        return None
    state, ids = _room(run, number), run.windows.ids[run.held]
    for at in range(len(ids)):
        state[at] = entrance.hidden(ids[at][None])[0]
    return state


def _room(run: Run, number: int) -> Tensor:
    """Hidden states of the windows that judge, `[windows, tokens, width]`, in a file."""
    shape, file = run.streams.read("float", 0)[run.held].shape, run.streams.folder / f"case-{number}"
    with file.open("w+b") as room:
        allocate(room.fileno(), 4 * shape.numel(), file)
    return torch.from_file(str(file), shared=True, size=shape.numel(), dtype=torch.float32).view(shape)


def _through(run: Run, path: str, index: int, cases: Sequence[Case], states: list[Tensor | None]) -> None:
    """Run the windows that judge through one block, of every case that differs by then."""
    inside = run.blueprint.blocks[path]
    here = {number: case for number, case in enumerate(cases) if any(name in inside for name in case.names)}
    if not here and not any(state is not None for state in states):
        return
    live, inputs = live_block(run, path), run.streams.read("float", index)[run.held]
    values = _values(run, live, index, here) if here else {}
    for number in range(len(cases)):
        if number not in here and states[number] is None:
            continue
        before = states[number]
        after = _room(run, number) if before is None else before
        for batch in run.windows.batches:
            if batch.start >= run.windows.fit:
                at = slice(batch.start - run.windows.fit, batch.stop - run.windows.fit)
                call = run.entrance.calls(run.windows.ids[batch])[path]
                after[at] = live.run(call, (inputs if before is None else before)[at], values.get(number))
        states[number] = after


def _values(run: Run, live: LiveBlock, index: int, cases: Mapping[int, Case]) -> dict[int, dict[str, Tensor]]:
    """What the weights of each case become, made as the run would."""
    found: dict[int, dict[str, Tensor]] = {number: {} for number in cases}
    wanted = {name for case in cases.values() for name in case.names}
    for site in sites_of(run, live, index):
        if not wanted & set(site):
            continue
        seen = see(run, live, [site], index)[site]
        for label in dict.fromkeys(case.scheme for case in cases.values() if set(case.names) & set(site)):
            with one_torch_thread():
                made = {job.entry.weight.name: made_by(job) for job in jobs_of(run, live, site, label, seen)}
            for number, case in cases.items():
                found[number] |= {n: made[n] for n in case.names if n in made and case.scheme == label}
    return found


def _divergences(run: Run, ways: Sequence[Exit | None], states: Sequence[Tensor | None]) -> list[float]:
    """Mean divergence of each case over the tokens of the windows that judge."""
    ids, last = run.windows.ids[run.held], run.streams.read("float", len(run.blueprint.blocks))[run.held]
    own, found = Exit(run.blueprint, run.entrance, ids), [0.0] * len(ways)
    for piece in pieces_of(run, ids):
        before = chances(own, ids, last, piece)
        for number, (way, state) in enumerate(zip(ways, states, strict=True)):
            after = chances(way or own, ids, last if state is None else state, piece)
            found[number] += divergence(before, after) / ids.numel()
    return [max(value, 0.0) for value in found]
