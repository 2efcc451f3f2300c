"""Decide: the plan for a budget; what errors cost is measured or read, then solved, checked or searched for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import final

from lowbit.budget import MemoryWatch
from lowbit.errors import UsageError
from lowbit.stages._quality import Interval
from lowbit.stages.budgets import sensitivity
from lowbit.stages.budgets.allocate import Allocation, Budget, Checked, Problem, group_of, make_problem, undecided
from lowbit.stages.budgets.check import check
from lowbit.stages.budgets.measures import MEASURES, measure
from lowbit.stages.budgets.narrow import Narrowed, kept_losses, narrow_schemes
from lowbit.stages.budgets.search import Trial, search
from lowbit.stages.budgets.wide import Widened, widened
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Calibration, Plan, Rules, make_offers, make_plan
from lowbit.stages.quantize import Progress
from lowbit.stages.samples import Samples
from lowbit.stages.write import write_atomic

Read = Callable[[Calibration], Samples]
Told = Trial | Allocation | Checked | Narrowed | Widened | sensitivity.Way


@final
@dataclass(frozen=True)
class Job:
    """What is asked for, of which checkpoint, and what the steps share.

    Attributes:
        folder: where temporary folders are made.
        ram: bytes of anonymous memory allowed; None for no limit.
        read: the windows of a text.
        tell: called with what was found on the way.
    """

    source: Checkpoint
    rules: Rules
    budget: Budget
    folder: Path
    ram: int | None
    threads: int
    watch: MemoryWatch
    progress: Progress
    read: Read
    tell: Callable[[Told], None]


def decide(job: Job, trial: Callable[[Plan], Interval]) -> Plan:
    """The plan for the budget.

    Args:
        trial: carries a plan out and measures what the budget limits; called where quality is asked for.

    Raises:
        LowbitError: see `lowbit.errors`.
    """
    rules, budget = job.rules, job.budget
    with ExitStack() as stack:
        offers = make_offers(job.source, rules, budget.choices(rules.format)) if budget.decides else {}
        plan = undecided(job.source, rules, offers)
        known, opened = _measured(job, offers, plan, stack)
        if not budget.decides:
            return _widened(job, make_plan(job.source, rules), known)
        others = [each.scheme for each in budget.running.others] if budget.running else []
        kept, unit = kept_losses(known.narrow, others), MEASURES[budget.measure].unit
        problem = make_problem(job.source, rules, offers, known.of(offers), budget.fused, plan, kept, unit)
        if budget.quality is None:
            return _widened(job, _within(job, problem, opened), known)
        limit = budget.quality
    share = budget.kl is None

    def tried(found: Allocation) -> Interval:
        measured = trial(_widened(replace(job, tell=lambda told: None), found.plan, known))
        job.tell(Trial(found, measured, limit, share))
        return measured

    best = search(problem, limit, tried, share).allocation
    job.tell(best)
    return _widened(job, best.plan, known)


def _widened(job: Job, plan: Plan, known: sensitivity.Sensitivity) -> Plan:
    """The plan with inputs as they are where rounding them costs more than the budget allows."""
    rules, budget = job.rules, job.budget
    if budget.rounding is None or rules.activations is None:
        return plan
    losses = {name: known.narrow[name][rules.activations] for name in known.readers}
    joined = partial(group_of, job.source, rules, fused=budget.fused)
    plan, told = widened(plan, rules.activations, losses, known.readers, budget.rounding, joined)
    job.tell(told)
    return plan


def _within(job: Job, problem: Problem, opened: Callable[[], sensitivity.Run]) -> Plan:
    """The plan within the limits; where it is asked, after the decisions that were nearest to another were measured."""
    best = problem.within(job.budget)
    if job.budget.check:
        best, checked = _checked(job.budget, problem, best, opened())
        job.tell(checked)
    job.tell(best)
    return best.plan


def _checked(
    budget: Budget, problem: Problem, first: Allocation, opened: sensitivity.Run
) -> tuple[Allocation, Checked]:
    """The plan after the nearest decisions were measured, and what that gave."""
    cases = problem.nearest(budget, first)
    measured = check(opened, cases, first.chosen if budget.beside else None)
    better, ratio = problem.corrected(cases, measured)
    found = better.within(budget)
    changed = {n: (first.chosen[n], scheme) for n, scheme in found.chosen.items() if scheme != first.chosen[n]}
    return found, Checked(len(cases) // 2, ratio, changed, budget.beside)


def _measured(
    job: Job, offers: sensitivity.Offers, plan: Plan, stack: ExitStack
) -> tuple[sensitivity.Sensitivity, Callable[[], sensitivity.Run]]:
    """What errors cost, measured, or from a file; saved where one is named.

    And what measuring works with, in a folder of its own: opened once, when it is first needed.
    """
    source, rules, budget, file = job.source, job.rules, job.budget, job.budget.sensitivity
    schemes = narrow_schemes(_narrow(rules, budget))
    if rules.calibration is None:
        raise UsageError("a budget is decided by what errors do to text: name some with --calibration FILE")
    samples = job.read(rules.calibration)
    opened = cache(
        lambda: stack.enter_context(
            sensitivity.opened(
                source, plan, offers, samples.ids, job.folder, job.ram, job.threads, job.watch, job.progress,
                budget.check > 0, schemes, MEASURES[budget.measure].whole, job.tell,
            )
        )
    )  # fmt: skip
    facts = sensitivity.conditions(source, rules, samples.sha256, budget.measure)
    known = sensitivity.Sensitivity(facts, {})
    if file and file.exists():
        known = sensitivity.read_sensitivity(file, facts)
    lacking, narrow = known.lacking(offers), known.lacking_narrow(schemes)
    if lacking or narrow:
        known = known.joined(measure(budget.measure, replace(opened(), offers=lacking, narrow=narrow)))
        if file:
            write_atomic(file, known.to_json().encode())
    if budget.narrow:
        job.tell(Narrowed(known.narrow_of(budget.narrow)))
    return known, opened


def _narrow(rules: Rules, budget: Budget) -> Sequence[str]:
    """The schemes of inputs and of the cache to measure."""
    inputs = [rules.activations] if rules.activations and budget.rounding is not None else []
    return [*budget.narrow, *inputs]
