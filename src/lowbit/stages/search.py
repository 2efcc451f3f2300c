"""Search: the smallest plan whose measured quality passes; solved, measured as a whole, corrected, and solved again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import expm1
from typing import final

from lowbit.errors import QualityError
from lowbit.stages._quality import Interval, Quality
from lowbit.stages.allocate import Allocation, Budget, Problem

_ROUNDS = 5
_NEAR = 1.02  # predicted loss of a plan that failed over that of one that passed: no plan between is worth a round


@final
@dataclass(frozen=True)
class Trial:
    """A plan, and what was asked of it as it was measured, with its 95% interval."""

    allocation: Allocation
    measured: Interval
    limit: float

    @property
    def passes(self) -> bool:
        """Whether even the upper end of the interval is within the limit."""
        return self.measured.worst <= self.limit


def asked(budget: Budget, quality: Quality) -> Interval:
    """What the budget limits: divergence, or the relative increase of the perplexity."""
    if budget.kl is not None:
        assert quality.divergence is not None
        return quality.divergence
    assert quality.change is not None
    ends = [None if part is None else expm1(part) for part in (quality.change.low, quality.change.high)]
    return Interval(expm1(quality.change.value), *ends)


def search(problem: Problem, limit: float, measure: Callable[[Allocation], Interval]) -> Trial:
    """The smallest plan that passes, of at most five that are measured.

    What is measured is taken to grow in proportion to what is predicted; between a plan that passed and one that failed
    the middle is tried where that leads out of them.

    Args:
        problem: what is to be decided.
        limit: most that the upper end of the measured interval may be.
        measure: quantizes a plan and measures it.

    Raises:
        QualityError: none of them passes.
    """
    trials: list[Trial] = []
    target = limit
    for _ in range(_ROUNDS):
        found = problem.within_loss(target)
        if any(found.plan == trial.allocation.plan for trial in trials):
            break
        trials.append(Trial(found, measure(found), limit))
        passed = max((t.allocation.loss for t in trials if t.passes), default=0.0)
        failed = min((t.allocation.loss for t in trials if not t.passes), default=float("inf"))
        if failed <= _NEAR * passed:
            break
        target = _next(trials[-1], passed, failed)
    best = min((trial for trial in trials if trial.passes), key=lambda trial: trial.allocation.size, default=None)
    if best is None:
        nearest = min(trials, key=lambda trial: trial.measured.worst).measured
        raise QualityError(
            f"no plan of the schemes on offer stays within {limit:.4g}: the best of {len(trials)} measured has "
            f"{nearest.value:.4g}, upper end {nearest.worst:.4g}; offer a scheme with more bits"
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
