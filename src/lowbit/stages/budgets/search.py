"""Search: the smallest plan whose measured quality passes; solved, measured as a whole, corrected, and solved again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import expm1, isfinite
from typing import final

from lowbit.budget import format_size
from lowbit.errors import QualityError
from lowbit.stages._quality import Interval, Quality
from lowbit.stages.budgets.allocate import Allocation, Budget, Problem

_ROUNDS = 5


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

    What is measured is taken to grow in proportion to what is predicted, and between a plan that passed and one that
    failed along a straight line. Where that leads to a plan that was measured, the next smaller one than the best that
    passed is tried: where it fails, nothing is left to try.

    Args:
        problem: what is to be decided.
        limit: most that the upper end of the measured interval may be.
        measure: quantizes a plan and measures it.
        share: what is measured is a relative increase.

    Raises:
        QualityError: none of them passes.
    """
    trials: list[Trial] = []
    found: Allocation | None = problem.within_loss(limit)
    while found:
        trials.append(Trial(found, measure(found), limit, share))
        found = _next(problem, trials) if len(trials) < _ROUNDS else None
    best = _best(trials)
    if best is None:
        nearest, show = min(trials, key=lambda t: t.measured.worst).measured, "{:.3%}" if share else "{:.4g}"
        raise QualityError(
            f"no plan of the schemes on offer stays within {show.format(limit)}: the best of {len(trials)} measured "
            f"has {show.format(nearest.value)}, upper end {show.format(nearest.worst)}; offer a scheme with more bits"
        )
    return best


def _best(trials: Sequence[Trial]) -> Trial | None:
    """The smallest that passed."""
    return min((trial for trial in trials if trial.passes), key=lambda trial: trial.allocation.size, default=None)


def _next(problem: Problem, trials: Sequence[Trial]) -> Allocation | None:
    """The plan to measure next; None where all that could tell more were measured."""
    passed, tried = _best(trials), [trial.allocation.plan for trial in trials]
    found = problem.within_loss(_aim(trials, passed))
    if found.plan not in tried:
        return found
    if passed is None or passed.allocation.size <= problem.smallest().size:
        return None
    found = problem.within_size(passed.allocation.size - 1)
    return None if found.plan in tried else found


def _aim(trials: Sequence[Trial], passed: Trial | None) -> float:
    """The predicted loss to aim at next."""
    last, failed = trials[-1], min((t for t in trials if not t.passes), key=lambda t: t.allocation.loss, default=None)
    target = last.limit * last.allocation.loss / max(last.measured.worst, 1e-12)
    if passed is None:
        assert failed is not None
        return target if target < failed.allocation.loss else failed.allocation.loss / 2
    low = passed.allocation.loss
    if failed is None:
        return target if target > low else 2 * low
    high, worst = failed.allocation.loss, failed.measured.worst
    if not isfinite(worst):
        return float((low * high) ** 0.5)
    return low + (high - low) * (last.limit - passed.measured.worst) / (worst - passed.measured.worst)
