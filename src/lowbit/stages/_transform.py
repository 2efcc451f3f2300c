"""Transforms: each chooses factors for the inputs of a block's sites, which are folded into the float weights.

Where nothing can take them they are stored beside the weights, if the plan has room for them there (`_room`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowbit import plugins
from lowbit.blocks import Site as BlockSite
from lowbit.stages._fold import Producer, effective, find_producer
from lowbit.stages._gather import Gatherer
from lowbit.stages._passes import Passes
from lowbit.stages._sites import Site, Step, joined
from lowbit.stages._state import Calibration, State
from lowbit.transforms import Transform


def transform(
    name: str, steps: Sequence[Step], work: Calibration, state: State, passes: Passes, gatherer: Gatherer
) -> None:
    """Let a transform choose factors for each site in the order of use, and fold or keep them."""
    record: Transform = plugins.load("transforms", name)
    options = work.options(record, name)
    readers = {site: names for site, names in joined(steps, state.live).items() if state.targets(names)}
    fit = [batch for batch in work.windows.batches if batch.start < work.windows.fit]
    for site, seen in gatherer.gather(dict.fromkeys(readers, record.needs), fit).items():
        names = readers[site]
        if not record.needs <= seen.stats.keys():
            continue
        producer, targets = producer_of(names, state, passes), tuple(state.targets(names))
        if producer or state.room.issuperset(targets):
            where = BlockSite(targets, state.width(names), producer.made_of if producer else None)
            factors = record.search(where, passes.view(steps), seen.stats, options)
            if factors is not None and producer:
                fold(names, producer, factors, state)
            elif factors is not None:
                keep(targets, factors, state)
    passes.memory.forget()  # attention may be of values that were divided since


def producer_of(site: Site, state: State, passes: Passes) -> Producer | None:
    """What a factor on a site's input can be taken from, where it is made of whole weights of the checkpoint."""
    hidden = passes.inputs[:1]

    def added(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        return passes.batch(slice(0, 1), weights=weights, parameters=parameters) - hidden

    found = find_producer(state.live, site, added)
    return found if found and all(state.owner(name) for name in found.parameters) else None


def keep(names: Sequence[str], factors: Tensor, state: State) -> None:
    """Multiply weights that a runtime will give their inputs divided by the same; as these factors are stored."""
    for name in names:
        held = state.factors.get(name, torch.ones(len(factors)))
        stored = (held / factors).to(state.entries[name].weight.dtype).float()
        state.floats[name] = state.meant(name, state.weight(name)) / stored
        state.factors[name] = stored


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
        value.copy_(state.meant(owner, new))
    for name in site:
        state.floats[name] = state.weight(name) * exact
        state.put(name, state.floats[name])
