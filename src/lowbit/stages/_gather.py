"""Gather: the statistics that the sites of a block need, from passes that end where they have seen enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import final

from torch import Tensor

from lowbit import plugins
from lowbit.methods import Method
from lowbit.stages._attention import Remembered
from lowbit.stages._blocks import LiveBlock
from lowbit.stages._observe import Accumulator, Observer, Seen
from lowbit.stages._passes import After, Passes
from lowbit.stages._products import Product
from lowbit.stages._sites import Found, Site, Step, find_router
from lowbit.stages._state import ABSMAX, Calibration, State

_CERTAIN = 30.0  # logits: a router that sees it chooses that expert
_ENOUGH = 4  # rows per input for an expert that got all tokens


@final
class Gatherer:
    """Takes statistics of one block; `reference` is the float block, where one of them compares the two."""

    def __init__(self, work: Calibration, state: State, passes: Passes, reference: LiveBlock | None = None) -> None:
        self._work, self._state, self._passes, self._reference = work, state, passes, reference

    def observe(
        self, steps: Sequence[Step], wanted: Callable[[Site], object], later: frozenset[str] = frozenset()
    ) -> dict[Site, Seen]:
        """What the wanted sites of some steps need, of as many at once as memory allows.

        Passes end at the `later` weights.
        """
        sites, seen = [site for step in steps for site in step.sites if wanted(site)], dict[Site, Seen]()
        for at in range(0, len(sites), self._work.way.sites):
            needs = {site: self._needs(site) for site in sites[at : at + self._work.way.sites]}
            seen |= self.gather(needs, self._work.windows.batches, later)
        for step in steps:
            seen |= self._all_tokens(step, seen, later) if step.experts else {}
        return seen

    def gather(
        self, needs: Mapping[Site, Iterable[str]], batches: Sequence[slice], later: frozenset[str] = frozenset()
    ) -> dict[Site, Seen]:
        """The statistics that each site needs, in one pass over batches of windows."""
        found = {site: self._accumulator(names) for site, names in needs.items()}
        self.look(batches, found, later)
        return {site: each.finish() for site, each in found.items()}

    def _accumulator(self, needs: Iterable[str]) -> Accumulator:
        windows = self._work.windows
        return Accumulator(sorted(needs), self._passes.index, len(windows.held) * windows.ids.shape[1])

    def look(
        self,
        batches: Sequence[slice],
        sites: Mapping[Site, Accumulator],
        later: frozenset[str],
        after: After | None = None,
    ) -> None:
        """Run batches of windows, as far as needed, and give what the sites read to their accumulators."""
        work, passes = self._work, self._passes
        reference = self._reference if after is None else None  # it has no pass with a changed router

        def rows_of(batch: slice) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
            own, other = Observer(sites, later), Observer(sites, later)
            if reference:
                hidden = work.streams.read("float", passes.index)[batch]
                beside = Remembered(passes.memory, "float", batch, lambda: bool(later))  # else none follows
                with suppress(Found):
                    reference.run(work.call(reference.path, len(hidden)), hidden, watch=other, recall=beside)
            rounding = passes.rounding()

            def both(product: Product) -> Tensor | None:
                own(product)
                return rounding(product) if rounding else None

            stream = "quantized" if after is None else "routed"
            recall = Remembered(passes.memory, stream, batch, lambda: own.before and after is None)
            with suppress(Found):
                passes.batch(batch, watch=both, after=after, recall=recall)
            return own.rows, other.rows

        def take(batch: slice, found: tuple[dict[Site, Tensor], dict[Site, Tensor]]) -> None:
            rows, references = found
            for site in rows:
                own, other = (self._scaled(site, found) for found in (rows[site], references.get(site, rows[site])))
                sites[site].take(own, other, batch.start >= work.windows.fit)

        passes.in_turn(rows_of, batches, take)

    def _scaled(self, site: Site, rows: Tensor) -> Tensor:
        """Inputs as a runtime gives them to the site's weights, where it multiplies them by factors first."""
        factors = next((self._state.factors[name] for name in site if name in self._state.factors), None)
        return rows if factors is None else rows * factors.to(rows)

    def _all_tokens(self, step: Step, seen: Mapping[Site, Seen], later: frozenset[str]) -> dict[Site, Seen]:
        """Experts that saw fewer rows than they have inputs: routed to them, one at a time, until they have enough."""
        width, windows = self._state.width, self._work.windows
        few = [site for site in step.sites if site in seen and seen[site].rows < width(site)]
        router = find_router(step, self._state.live)
        found: dict[Site, Seen] = {}
        for site in few if router else ():
            accumulator, expert = self._accumulator(self._needs(site)), step.sites.index(site)

            def choose(product: Product, result: Tensor, expert: int = expert) -> Tensor:
                if product.names[0] == router:
                    result = result.clone()
                    result[..., expert] = result.amax(-1) + _CERTAIN
                return result

            for batch in windows.batches:
                if accumulator.rows < _ENOUGH * width(site) or batch.start >= windows.fit:
                    self.look([batch], {site: accumulator}, later, after=choose)
            found[site] = replace(accumulator.finish(), starved=seen[site].rows)
        return found

    def _needs(self, site: Site) -> set[str]:
        weights = [self._state.entries[name] for name in self._state.targets(site)]
        methods: list[Method] = [plugins.load("methods", entry.method) for entry in weights if entry.method]
        needs = {need for method in methods for need in method.needs}
        needs |= {need for name in self._work.recipe.corrections for need in plugins.load("corrections", name).needs}
        return needs | ({ABSMAX} if self._state.rounds(site) else set())
