"""Transforms: each chooses factors for the inputs of a block's sites, which are folded into the float weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowbit import plugins
from lowbit.blocks import Site as BlockSite
from lowbit.stages._fold import Producer, effective, find_producer
from lowbit.stages._gather import Gatherer
from lowbit.stages._passes import Passes
from lowbit.stages._sites import Site, Step
from lowbit.stages._state import Calibration, State
from lowbit.transforms import Transform


def transform(
    name: str, steps: Sequence[Step], work: Calibration, state: State, passes: Passes, gatherer: Gatherer
) -> None:
    """Let a transform choose factors for each site in the order of use, and fold them."""
    record: Transform = plugins.load("transforms", name)
    options = work.options(record, name)
    readers = {site: names for site, names in joined(steps, state).items() if state.targets(names)}
    fit = [batch for batch in work.windows.batches if batch.start < work.windows.fit]
    for site, seen in gatherer.gather(dict.fromkeys(readers, record.needs), fit).items():
        names = readers[site]
        producer = producer_of(names, state, passes) if seen.stats else None
        if producer:
            where = BlockSite(tuple(state.targets(names)), state.width(names), producer.made_of)
            factors = record.search(where, passes.view(steps), seen.stats, options)
            if factors is not None:
                fold(names, producer, factors, state)
    passes.memory.forget()  # attention may be of values that were divided since


def joined(steps: Sequence[Step], state: State) -> dict[Site, Site]:
    """All weights that read one input, by the site at which it is seen: that of a router is that of its experts too."""
    found: dict[Site, Site] = {}
    for step in steps:
        router = state.router(step)
        at = next((site for site in found if router in site and found[site] == site), None)
        if at and state.width(at) == state.width(step.sites[0]):
            found[at] = at + step.names
        else:
            found |= {site: site for site in step.sites}
    return found


def producer_of(site: Site, state: State, passes: Passes) -> Producer | None:
    """What a factor on a site's input can be taken from, where it is made of whole weights of the checkpoint."""
    hidden = passes.inputs[:1]

    def added(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        return passes.batch(slice(0, 1), weights=weights, parameters=parameters) - hidden

    found = find_producer(state.live, site, added)
    return found if found and all(state.owner(name) for name in found.parameters) else None


def fold(site: Site, producer: Producer, factors: Tensor, state: State) -> None:
    """Divide what makes the input, multiply what reads it; readers take the factors as they were rounded."""
    exact = factors
    for parameter in producer.parameters:
        owner, value = state.owner(parameter), state.live.tensor(parameter)
        assert owner is not None
        stored, whole = state.entries[owner].weight, state.weight(owner)
        new = producer.divided(whole, factors, torch.float32 if stored.scheme else stored.dtype)
        if value.dim() == 1 and parameter == producer.parameters[0]:
            exact = effective(producer, whole, new, factors)
        state.floats[owner] = new.float()
        value.copy_(new)
    for name in site:
        state.floats[name] = state.weight(name) * exact
        state.live.weight(name).copy_(state.floats[name])
