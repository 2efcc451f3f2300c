"""Check: what single decisions of a plan really cost, where the prediction was nearly undecided between two schemes.

Leave-one-in: the divergence of the model with the weights of one decision quantized, and nothing else. Leave-one-out:
what these weights add to the divergence of the plan in which they are left as they are. All variants of the model run
through the blocks side by side, one block in memory at a time, from the block in which they differ from the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lowbit.blocks import CPU
from lowbit.stages._blocks import Entrance, Exit, LiveBlock
from lowbit.stages._model import Blueprint
from lowbit.stages.budgets.sensitivity import (
    Run,
    chances,
    divergence,
    jobs_of,
    live_block,
    made_by,
    made_outside,
    pieces_of,
    replaced,
    see,
    sites_of,
)
from lowbit.stages.quantize import one_torch_thread
from lowbit.stages.write import allocate

Variant = Mapping[str, str]  # weight to the scheme on offer that it gets; all others stay as they are


@final
@dataclass(frozen=True)
class Case:
    """Weights that are replaced together, and the scheme on offer that they get."""

    names: tuple[str, ...]
    scheme: str

    @property
    def alone(self) -> dict[str, str]:
        """With nothing else quantized."""
        return dict.fromkeys(self.names, self.scheme)


def check(run: Run, cases: Sequence[Case], chosen: Variant | None = None) -> list[float]:
    """What each case costs, nats per token.

    Args:
        chosen: a plan, for what a case adds to the divergence of that plan (leave-one-out), 0 where it adds none; None
            for the divergence of each case alone (leave-one-in).
    """
    if chosen is None:
        return divergences(run, [case.alone for case in cases])
    without = [{name: scheme for name, scheme in chosen.items() if name not in case.names} for case in cases]
    found = divergences(run, [*without, *({**chosen, **case.alone} for case in cases)])
    return [max(whole - rest, 0.0) for rest, whole in zip(found, found[len(cases) :], strict=False)]


@torch.no_grad()
def divergences(run: Run, variants: Sequence[Variant]) -> list[float]:
    """The divergence of each variant of the model from the original, nats per token; equal ones are measured once."""
    changed = [{name: s for name, s in each.items() if run.offers[name][s].weight.scheme} for each in variants]
    keys = [frozenset(variant.items()) for variant in changed]
    alike = dict(zip(keys, changed, strict=True))
    paths, several = list(run.blueprint.blocks), list(alike.values())
    ends = _ends(run, several)
    entrances = {end: Entrance(end, CPU) for end in dict.fromkeys(ends) if end}
    states = _started(run, ends, entrances)
    for index, path in enumerate(paths):
        run.progress("check", index, len(paths))
        run.watch.check()
        _through(run, path, index, several, states)
    found = dict(zip(alike, _judged(run, ends, entrances, states), strict=True))
    run.progress("check", len(paths), len(paths))
    return [found[key] for key in keys]


def _ends(run: Run, variants: Sequence[Variant]) -> list[Blueprint | None]:
    """The model of each variant where it differs outside of the blocks; one for all that are alike there."""
    inside = frozenset[str]().union(*run.blueprint.blocks.values())
    known: dict[frozenset[tuple[str, str]], Blueprint | None] = {frozenset(): None}
    made: dict[tuple[str, str], Tensor] = {}
    found = []
    for variant in variants:
        outside = frozenset((name, scheme) for name, scheme in variant.items() if name not in inside)
        if outside not in known:
            made |= {each: made_outside(run, run.offers[each[0]][each[1]]) for each in outside - made.keys()}
            known[outside] = replaced(run, {each[0]: made[each] for each in outside})
        found.append(known[outside])
    return found


def _started(
    run: Run, ends: Sequence[Blueprint | None], entrances: Mapping[Blueprint, Entrance]
) -> list[Tensor | None]:
    """Rooms for the hidden states of variants that differ before the first block, with them in it."""
    rooms = {number: _room(run, number) for number, end in enumerate(ends) if end}
    for end, entrance in entrances.items():
        own = [room for number, room in rooms.items() if ends[number] is end]
        for at, ids in enumerate(run.windows.ids[run.held]):
            hidden = entrance.hidden(ids[None])[0]
            for room in own:
                room[at] = hidden
    return [rooms.get(number) for number in range(len(ends))]


def _room(run: Run, number: int) -> Tensor:
    """Hidden states of the windows that judge, `[windows, tokens, width]`, in a file."""
    shape, file = run.streams.read("float", 0)[run.held].shape, run.streams.folder / f"case-{number}"
    with file.open("w+b") as room:
        allocate(room.fileno(), 4 * shape.numel(), file)
    return torch.from_file(str(file), shared=True, size=shape.numel(), dtype=torch.float32).view(shape)


def _through(run: Run, path: str, index: int, variants: Sequence[Variant], states: list[Tensor | None]) -> None:
    """Run the windows that judge through one block, of every variant that differs by then."""
    inside = run.blueprint.blocks[path]
    here = [{name: scheme for name, scheme in variant.items() if name in inside} for variant in variants]
    if not any(here) and not any(state is not None for state in states):
        return
    live, inputs = live_block(run, path), run.streams.read("float", index)[run.held]
    values = dict(_values(run, live, index, {pair for each in here for pair in each.items()}))
    for number, own in enumerate(here):
        before = states[number]
        if not own and before is None:
            continue
        after = _room(run, number) if before is None else before
        weights = {name: values[name, scheme] for name, scheme in own.items() if (name, scheme) in values}
        for batch in run.windows.batches:
            if batch.start >= run.windows.fit:
                at = slice(batch.start - run.windows.fit, batch.stop - run.windows.fit)
                call = run.entrance.calls(run.windows.ids[batch])[path]
                after[at] = live.run(call, (inputs if before is None else before)[at], weights)
        states[number] = after


def _values(
    run: Run, live: LiveBlock, index: int, wanted: set[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """What weights become in the schemes that are wanted of them, made as the run would."""
    for site in sites_of(run, live, index) if wanted else ():
        pairs = [(name, scheme) for name, scheme in sorted(wanted) if name in site]
        if not pairs:
            continue
        seen = see(run, live, [site], index)[site]
        for label in dict.fromkeys(scheme for _, scheme in pairs):
            names = tuple(name for name, scheme in pairs if scheme == label)
            with one_torch_thread():
                yield from (((j.entry.weight.name, label), made_by(j)) for j in jobs_of(run, live, names, label, seen))


def _judged(
    run: Run,
    ends: Sequence[Blueprint | None],
    entrances: Mapping[Blueprint, Entrance],
    states: Sequence[Tensor | None],
) -> list[float]:
    """Mean divergence of each variant over the tokens of the windows that judge."""
    ids, last = run.windows.ids[run.held], run.streams.read("float", len(run.blueprint.blocks))[run.held]
    own, found = Exit(run.blueprint, run.entrance, ids, held=True), [0.0] * len(ends)
    for end in dict.fromkeys(ends):
        way = Exit(end, entrances[end], ids, held=True) if end else own
        for piece in pieces_of(run, ids):
            before = chances(own, ids, last, piece)
            for number, state in enumerate(states):
                if ends[number] is end:
                    after = chances(way, ids, last if state is None else state, piece)
                    found[number] += divergence(before, after) / ids.numel()
    return [max(value, 0.0) for value in found]
