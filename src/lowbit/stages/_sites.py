"""Sites: which weights of a block read one input, in which order, found by running the block once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowbit.stages._blocks import LiveBlock
from lowbit.stages._products import Product

Site = tuple[str, ...]  # names of the weights that read one input
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+")  # an index: the 1 of `w1` says which matrix it is


@final
@dataclass(frozen=True)
class Step:
    """Sites whose inputs do not depend on each other: calibrated in one pass, quantized together.

    One site as a rule; one per expert where the block has experts.

    Attributes:
        sites: names of the weights that read one input, for each site.
        experts: whether the sites are experts, which see some of the tokens each.
    """

    sites: tuple[Site, ...]
    experts: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All weights of the step."""
        return tuple(name for site in self.sites for name in site)


@final
class Found(Exception):
    """A pass has seen what it was made for; the rest of the block need not run."""


def find_steps(live: LiveBlock, run: Callable[[Callable[[Product], None]], object]) -> list[Step]:
    """The steps of a block in the order in which it uses its weights; notes which are stored transposed.

    Args:
        live: the block; weights that no product reads are left out of the steps.
        run: runs the block on some tokens under the given watch.
    """
    seen: dict[tuple[str, ...], tuple[object, Tensor]] = {}  # the rows stay alive: no address is used twice

    def watch(product: Product) -> None:
        seen.setdefault(product.names, ((product.rows.data_ptr(), tuple(product.rows.shape)), product.rows))
        for name in product.names:
            if product.swapped and not live.places[name].swapped:
                live.swap(name)

    run(watch)
    joined: dict[object, tuple[str, ...]] = {}
    for names, (address, _) in seen.items():
        joined[address] = joined.get(address, ()) + names
    return _merge(_with_silent(list(joined.values()), list(live.places)))


def _with_silent(sites: Sequence[tuple[str, ...]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Add the sites of experts that got no token: like those of an expert that did."""
    silent = set(names) - {name for site in sites for name in site}
    found = list(sites)
    for name in sorted(silent, key=_numbers):
        like = next((site for site in sites if any(family(other) == family(name) for other in site)), None)
        if name in silent and like:
            site = tuple(_renumber(other, _numbers(name)) for other in like)
            found.append(site)
            silent -= set(site)
    return found


def _merge(sites: Sequence[tuple[str, ...]]) -> list[Step]:
    """Sites whose names differ in indices alone are experts of one step."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for site in sites:
        groups.setdefault(tuple(family(name) for name in site), []).append(site)
    return [Step(tuple(sorted(group, key=lambda site: _numbers(site[0]))), len(group) > 1) for group in groups.values()]


def find_router(step: Step, live: LiveBlock) -> str | None:
    """The weight that has a row for each expert of a step."""
    rows = len(step.sites) if step.experts else 0
    names = (name for name in live.places if name not in step.names)
    return next((name for name in names if live.weight(name).shape[0] == rows), None)


def joined(steps: Sequence[Step], live: LiveBlock) -> dict[Site, Site]:
    """All weights that read one input, by the site at which it is seen: that of a router is that of its experts too."""
    found: dict[Site, Site] = {}
    for step in steps:
        router = find_router(step, live)
        at = next((site for site in found if router in site and found[site] == site), None)
        if at and live.weight(at[0]).shape[1] == live.weight(step.sites[0][0]).shape[1]:
            found[at] = at + step.names
        else:
            found |= {site: site for site in step.sites}
    return found


def family(name: str) -> str:
    """A name without its indices: `model.layers.3.mlp.experts.7.w1.weight` and its like in all experts."""
    return _NUMBER.sub("*", name)


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(name)))


def _renumber(name: str, numbers: tuple[int, ...]) -> str:
    """`name` with indices of another."""
    given = iter(numbers)
    return _NUMBER.sub(lambda own: str(next(given, own[0])), name)
