"""Observe: statistics of what the weights of a step read, taken while windows run through the block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lowbit import plugins
from lowbit.blocks import CPU
from lowbit.methods import Stats
from lowbit.stages._products import Product
from lowbit.stages._sites import Found, Site
from lowbit.stats import State, Statistic

_HELD_SHARE = 16
_ROWS = 1024
UNREACHED = "no calibration row reached it"

Watch = Callable[[Product], Tensor | None]


@final
@dataclass(frozen=True)
class Windows:
    """Calibration windows: the first `fit` are learned from, the others judge; `tokens` go through a block at once."""

    ids: Int64[Tensor, "windows tokens"]
    fit: int
    tokens: int

    @property
    def batches(self) -> list[slice]:
        """Runs of windows that go through a block together; none holds windows of both kinds."""
        step = max(self.tokens // self.ids.shape[1], 1)
        runs = [(0, self.fit), (self.fit, len(self.ids))]
        return [slice(at, min(at + step, stop)) for start, stop in runs for at in range(start, stop, step)]

    @property
    def held(self) -> list[int]:
        """The windows that judge."""
        return list(range(self.fit, len(self.ids)))


def split_windows(ids: Int64[Tensor, "windows tokens"], tokens: int) -> Windows:
    """Keep a sixteenth of the windows, at least one where there are two, for judging."""
    held = max(len(ids) // _HELD_SHARE, 1) if len(ids) > 1 else 0
    return Windows(ids, len(ids) - held, tokens)


@final
@dataclass(frozen=True)
class Seen:
    """What calibration saw at one site.

    Attributes:
        stats: those of the statistics asked for that are finite.
        held: rows to judge by, finite; none where no window was held out or none of its rows got here.
        rows: number of rows learned from.
        starved: rows that the router sent to an expert that was then given all tokens; None for others.
        useless: why nothing can be learned from what was seen; None where something can.
    """

    stats: Stats
    held: Float[Tensor, "n cols"]
    rows: int
    starved: int | None = None
    useless: str | None = None


@final
class Accumulator:
    """Statistics of one site while rows come in.

    Args:
        needs: names of the statistics.
        seed: of statistics that choose at random.
        held: rows to judge by that may come; they are thinned out evenly.
    """

    def __init__(self, needs: Sequence[str], seed: int, held: int) -> None:
        self._kinds: dict[str, Statistic] = {name: plugins.load("stats", name) for name in needs}
        self._states: dict[str, State] = {}
        self._held: list[Tensor] = []
        self._largest = 0.0  # magnitude of all rows; NaN where one has it
        self._seed, self._step, self.rows = seed, max(-(-held // _ROWS), 1), 0

    def take(self, rows: Tensor, reference: Tensor | None, held: bool) -> None:
        """More rows, and the float model's: to judge by, or to learn from."""
        if reference is None or reference.shape != rows.shape:  # experts: the float model routes other tokens
            reference = rows
        self._largest = _greater(self._largest, _largest(rows))
        if held:
            self._held.append(rows[:: self._step].to("cpu", copy=True))
            return
        for name, kind in self._kinds.items():
            place = rows.device if kind.anywhere else CPU
            state = self._states.setdefault(name, {}) or _on(place, kind.start(rows.shape[1], self._seed))
            self._states[name] = state
            kind.update(state, rows.to(place), reference.to(place) if kind.paired else None)
        self.rows += len(rows)

    def finish(self) -> Seen:
        """All that was seen; the rows to judge by are thinned out."""
        stats = {name: self._kinds[name].finish(_on(CPU, self._states.pop(name))) for name in list(self._states)}
        finite = {name: value for name, value in stats.items() if isfinite(_largest(value))}
        held = torch.cat(self._held) if self._held and isfinite(self._largest) else torch.empty(0, 0)
        self._held = []
        return Seen(finite, held.float(), self.rows, useless=self._useless(len(finite) < len(stats)))

    def _useless(self, overflow: bool) -> str | None:
        """Why nothing can be learned from the rows."""
        if not self.rows:
            return UNREACHED
        if not isfinite(self._largest):
            return "its inputs are not finite"
        if not self._largest:
            return "its inputs are all 0"
        return "its inputs are so large that their statistics are not finite" if overflow else None


def _largest(values: Tensor) -> float:
    """The largest magnitude, NaN where there is one; without a copy of the values."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))


def _greater(one: float, other: float) -> float:
    """The greater; NaN where either is."""
    return one if isnan(one) or one > other else other


def _on(place: torch.device, state: State) -> State:
    return {name: tensor.to(place) for name, tensor in state.items()}


@final
class Observer:
    """A watch of one pass: keeps what the products of some sites read, and ends the pass when all are seen or past."""

    def __init__(self, sites: Collection[Site], later: frozenset[str]) -> None:
        self._count, self._of = len(sites), {name: site for site in sites for name in site}
        self._later = later
        self.rows: dict[Site, Tensor] = {}
        self.before = True  # whether the pass has not reached the sites yet

    def __call__(self, product: Product) -> None:
        """See a product."""
        if product.names[0] in self._later:
            raise Found
        site = self._of.get(product.names[0])
        if site is not None:
            self.before = False
            self.rows.setdefault(site, product.rows)
            if len(self.rows) == self._count:
                raise Found
