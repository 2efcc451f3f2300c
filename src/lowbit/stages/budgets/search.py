"""Search: the smallest plan whose measured quality passes; solved, measured as a whole, corrected, and solved again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import expm1
from typing import final

from lowbit.budget import format_size
from lowbit.errors import QualityError
from lowbit.stages._quality import Interval, Quality
from lowbit.stages.budgets.allocate import Allocation, Budget, Problem

_ROUNDS = 5
_NEAR = 1.02  # predicted loss of a plan that failed over that of one that passed: no plan between is worth a round


@final
@dataclass(frozen=True)
class Trial:
    """A plan, and what was asked of it as it was measured, with its 95% interval.

    `share`: that is a relative increase of the perplexity, not a divergence.
    """

    allocation: Allocation
    measured: Interval
    limit: float
    share: bool = False

    @property
    def passes(self) -> bool:
        """Whether even the upper end of the interval is within the limit."""
        return self.measured.worst <= self.limit

    def lines(self) -> Iterator[str]:
        """What is said of it."""
        found, measured = self.allocation, self.measured
        show = "{:.3%}".format if self.share else "{:.4g}".format
        what = "increase of the perplexity" if self.share else "divergence"
        interval = "" if measured.low is None else f" [{show(measured.low)}, {show(measured.worst)}]"
        yield (
            f"plan of {format_size(found.size)}, predicted {found.predicted}: {what} {show(measured.value)}{interval}, "
            f"at most {show(self.limit)} was asked for: {'passes' if self.passes else 'misses'}"
        )


def asked(budget: Budget, quality: Quality) -> Interval:
    """What the budget limits: divergence, or the relative increase of the perplexity."""
    if budget.kl is not None:
        assert quality.divergence is not None
        return quality.divergence
    assert quality.change is not None
    ends = [None if part is None else expm1(part) for part in (quality.change.low, quality.change.high)]
    return Interval(expm1(quality.change.value), *ends)


def search(problem: Problem, limit: float, measure: Callable[[Allocation], Interval], share: bool = False) -> Trial:
    """The smallest plan that passes, of at most five that are measured.

    What is measured is taken to grow in proportion to what is predicted; between a plan that passed and one that failed
    the middle is tried where that leads out of them.

    Args:
        problem: what is to be decided.
        limit: most that the upper end of the measured interval may be.
        measure: quantizes a plan and measures it.
        share: what is measured is a relative increase.

    Raises:
        QualityError: none of them passes.
    """
    trials: list[Trial] = []
    target = limit
    for _ in range(_ROUNDS):
        found = problem.within_loss(target)
        if any(found.plan == trial.allocation.plan for trial in trials):
            break
        trials.append(Trial(found, measure(found), limit, share))
        passed = max((t.allocation.loss for t in trials if t.passes), default=0.0)
        failed = min((t.allocation.loss for t in trials if not t.passes), default=float("inf"))
        if failed <= _NEAR * passed:
            break
        target = _next(trials[-1], passed, failed)
    best = min((trial for trial in trials if trial.passes), key=lambda trial: trial.allocation.size, default=None)
    if best is None:
        nearest, show = min(trials, key=lambda t: t.measured.worst).measured, "{:.3%}" if share else "{:.4g}"
        raise QualityError(
            f"no plan of the schemes on offer stays within {show.format(limit)}: the best of {len(trials)} measured "
            f"has {show.format(nearest.value)}, upper end {show.format(nearest.worst)}; offer a scheme with more bits"
        )
    return best


def _next(last: Trial, passed: float, failed: float) -> float:
    """The predicted loss to aim at next."""
    target = last.limit * last.allocation.loss / max(last.measured.worst, 1e-12)
    if passed < target < failed:
        return target
    if passed and failed < float("inf"):
        return float((passed * failed) ** 0.5)
    return failed / 2 if failed < float("inf") else 2 * passed
