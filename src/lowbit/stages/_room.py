"""Room: which weights get factors of their inputs beside them, since nothing that makes the input can take these.

Files are laid out before the first weight is done, so the plan says it. Blocks whose weights have the same names are
alike: the first of each kind is run on a few tokens, and looked at as a transform looks at it (`_transform`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.formats import Weight
from lowbit.stages._blocks import Call, Entrance, LiveBlock
from lowbit.stages._fold import find_producer
from lowbit.stages._model import Blueprint, open_blueprint
from lowbit.stages._recipe import parse_recipe
from lowbit.stages._sites import find_steps, joined
from lowbit.stages.calibrate import compute_dtype
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Entry, Plan, as_planned

_TOKENS = 16
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block or an expert; not that of Mixtral's `w1`
_REASON = "; factors of its inputs beside it, which nothing in the model can take"


def with_factors(plan: Plan, source: Checkpoint) -> Plan:
    """The plan with factors of inputs for weights that a transform may find some for, where the format has a place.

    Raises:
        CheckpointError: the model cannot be run.
    """
    if not parse_recipe(plan.recipe).smooths:
        return plan
    able = {entry.weight.name for entry in plan.entries if _holds(plan, entry.weight)}
    if not able:
        return plan
    with torch.no_grad():
        blueprint = open_blueprint(as_planned(source, plan), compute_dtype(plan))
        wanted = able.intersection(_without_producer(blueprint))
    return replace(plan, entries=tuple(_smooth(e) if e.weight.name in wanted else e for e in plan.entries))


def _holds(plan: Plan, weight: Weight) -> bool:
    if weight.scheme is None or weight.scheme.smooth:
        return False
    try:
        return plan.rules.fit(replace(weight.scheme, smooth=True), replace(weight, scheme=None)).smooth
    except UnsupportedError:
        return False


def _smooth(entry: Entry) -> Entry:
    scheme = entry.weight.scheme
    smooth = scheme and replace(scheme, smooth=True)
    return replace(entry, weight=replace(entry.weight, scheme=smooth), reason=entry.reason + _REASON)


def _without_producer(blueprint: Blueprint) -> Iterator[str]:
    """Weights whose input is made by nothing that can take a factor."""
    ids = torch.arange(_TOKENS)[None] % blueprint.vocabulary
    entrance = Entrance(blueprint, torch.device("cpu"))
    hidden, calls, known = entrance.hidden(ids), entrance.calls(ids), dict[frozenset[str], frozenset[str]]()
    for path, names in blueprint.blocks.items():
        kind = frozenset(map(_kind, names))
        if kind not in known:
            known[kind] = frozenset(map(_kind, _unmade(blueprint, path, hidden, calls[path])))
        yield from (name for name in names if _kind(name) in known[kind])


def _kind(name: str) -> str:
    return _NUMBER.sub("*", name)


def _unmade(blueprint: Blueprint, path: str, hidden: Tensor, call: Call) -> Iterator[str]:
    """Those of one block, which `find_producer` is asked about as it is for a transform."""
    weights = blueprint.checkpoint.weights
    matrices = [name for name in blueprint.blocks[path] if len(weights[name].shape) == 2]
    live, owners = LiveBlock(blueprint, path, matrices, hidden.device), blueprint.sources(path)

    def added(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        return live.run(call, hidden, weights, parameters) - hidden

    for readers in joined(find_steps(live, lambda watch: live.run(call, hidden, watch=watch)), live).values():
        producer = find_producer(live, readers, added)
        if producer is None or any(len(owners[name]) != 1 for name in producer.parameters):
            yield from readers
