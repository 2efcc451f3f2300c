"""Low-rank terms beside a block's weights: fitted before their codes are made or after, under a budget shared last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from lowbit import plugins
from lowbit.corrections import Correction, Options, Term
from lowbit.corrections._lowrank import ranks
from lowbit.stages._attention import Memory
from lowbit.stages._gather import Gatherer
from lowbit.stages._observe import Seen
from lowbit.stages._sites import Step
from lowbit.stages._state import Calibration, State


@final
class Corrections:
    """Carries out the corrections of the recipe on one block."""

    def __init__(self, work: Calibration, state: State) -> None:
        self._work, self._state = work, state
        self._open: dict[str, Term] = {}  # those whose ranks the block's budget will choose

    @property
    def learn(self) -> bool:
        """Whether a correction of the recipe reads statistics."""
        return any(plugins.load("corrections", step).needs for step in self._work.recipe.corrections)

    def residual(self, name: str, whole: Tensor, seen: Seen) -> Tensor:
        """What is left of a weight when the terms that come before its codes are taken out of it."""
        for step, correction, options in self._reaching(name, seen, before=True):
            left = whole.float()
            term = correction.fit(left, seen.stats, options)
            self._put(name, step, term)
            whole = torch.addmm(left, term.up, term.down, alpha=-1)
        return whole

    def correct(self, name: str, seen: Seen) -> None:
        """Fit the terms that come after a weight's codes to what is left of it, one after the other."""
        beside = self._state.terms
        for step, correction, options in self._reaching(name, seen, before=False):
            left = self._state.weight(name) - self._state.live.weight(name).to("cpu", torch.float32)
            for term in beside.get(name, {}).values():
                left.addmm_(term.up, term.down, alpha=-1)
            term = correction.fit(left, seen.stats, options)
            if options.budget is None:
                self._put(name, step, term)
            else:  # the steps that follow see it with the rank that it has where all have the same
                self._open[name] = term
                beside.setdefault(name, {})[step] = term.first(options.even(*left.shape))

    def mend(self, steps: Sequence[Step], gatherer: Gatherer) -> None:
        """Correct weights that were learned together: step by step, each on what the terms before it mended."""
        made = self._state.made
        for step in steps if self._work.recipe.corrections else ():
            for site, seen in gatherer.observe([step], made.intersection).items():
                for name in (name for name in site if name in made):
                    self.correct(name, seen)

    def spend(self, memory: Memory) -> None:
        """Distribute the block's share of the budget over the terms that were left open."""
        if not self._open:
            return
        step = self._work.recipe.corrections[-1]
        budget = self._work.options(plugins.load("corrections", step), step).budget
        weights = sum(len(term.up) * term.down.shape[1] for term in self._open.values())
        for name, rank in ranks(self._open, int(budget * weights / 8)).items():
            self._put(name, step, self._open[name].first(rank))
        memory.forget()  # attention was of the ranks before

    def _reaching(self, name: str, seen: Seen, before: bool) -> Iterator[tuple[str, Correction, Options]]:
        """The corrections that a weight gets before its codes are made, or after, with their options."""
        for step in self._work.recipe.corrections:
            correction: Correction = plugins.load("corrections", step)
            reached = name in self._state.live.places and seen.rows and correction.needs <= seen.stats.keys()
            if reached and correction.before == before:
                yield step, correction, self._work.options(correction, step)

    def _put(self, name: str, step: str, term: Term) -> None:
        """Place a term beside its weight, for good."""
        self._state.terms.setdefault(name, {})[step] = term
        if len(term.gains):
            self._work.terms.add(name, step, term.down, term.up)
