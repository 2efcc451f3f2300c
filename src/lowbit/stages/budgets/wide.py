"""Wide: which layers read their inputs as they are, so that rounding the others' costs no more than allowed.

The fewest weights are multiplied with wide inputs whose rounding, as predicted, would pass the limit: a choice for each
input, or for all that runtimes join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import final

from lowbit.stages.budgets.solve import solve
from lowbit.stages.plan import Entry, Plan

_SHOWN = 10
_REASON = "; its inputs stay wide for --activations-within"


@final
@dataclass(frozen=True)
class Widened:
    """What was decided of a plan's inputs.

    Attributes:
        scheme: what they are rounded to.
        most: that this may be predicted to cost, nats per token; `cost`: of those that are rounded.
        wide: what each that stays as it is would have cost, under the name of the first weight that reads it.
        count: of all inputs.
    """

    scheme: str
    most: float
    cost: float
    wide: Mapping[str, float]
    count: int

    def lines(self) -> Iterator[str]:
        """What is said of it."""
        yield (
            f"inputs: {self.count - len(self.wide)} of {self.count} are rounded to {self.scheme}, predicted to cost "
            f"{self.cost:.3g} nats per token of {self.most:.3g}; {len(self.wide)} stay wide"
        )
        most = sorted(self.wide, key=lambda name: -self.wide[name])
        yield from (f"  {name.removesuffix('.weight')}: {self.wide[name]:.2g}" for name in most[:_SHOWN])
        if len(most) > _SHOWN:
            yield f"  and {len(most) - _SHOWN} more"


def widened(
    plan: Plan,
    scheme: str,
    losses: Mapping[str, float],
    readers: Mapping[str, Sequence[str]],
    most: float,
    joined: Callable[[str], str],
) -> tuple[Plan, Widened]:
    """The plan with some inputs as they are, so that rounding the others is predicted to cost at most so much.

    Args:
        scheme: to which inputs are rounded.
        losses: of each input, under the name of the first weight that reads it.
        readers: the weights that read it.
        most: nats per token.
        joined: what weights whose inputs must be alike have in common.
    """
    rounds = {entry.weight.name: entry for entry in plan.entries if entry.weight.activations}
    sites = {first: own for first in losses if (own := [name for name in readers[first] if name in rounds])}
    groups = _groups(sites, joined)
    sizes = [float(sum(prod(rounds[name].weight.shape) for first in each for name in sites[first])) for each in groups]
    costs = [sum(losses[first] for first in each) for each in groups]
    picked = solve([[0.0, size] for size in sizes], [[cost, 0.0] for cost in costs], most).picked if groups else ()
    wide = {first: losses[first] for each, at in zip(groups, picked, strict=True) if at for first in each}
    names = {name for first in wide for name in sites[first]}
    entries = tuple(_as_it_is(entry) if entry.weight.name in names else entry for entry in plan.entries)
    cost = sum((losses[first] for first in sites if first not in wide), 0.0)
    return replace(plan, entries=entries), Widened(scheme, most, cost, wide, len(sites))


def _groups(sites: Mapping[str, Sequence[str]], joined: Callable[[str], str]) -> list[list[str]]:
    """Inputs that are decided together, by the first weights that read them."""
    found: list[tuple[set[str], list[str]]] = []
    for first, names in sites.items():
        keys, own = set(map(joined, names)), [first]
        for other in [each for each in found if each[0] & keys]:
            found.remove(other)
            keys, own = keys | other[0], other[1] + own
        found.append((keys, own))
    return [own for _, own in found]


def _as_it_is(entry: Entry) -> Entry:
    return replace(entry, weight=replace(entry.weight, activations=None), reason=entry.reason + _REASON)
