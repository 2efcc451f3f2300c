"""Allocate: which scheme each weight gets, so that the predicted loss is least under one budget, or under two."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import final

from lowbit import plugins
from lowbit.budget import format_size, format_sum
from lowbit.errors import UsageError
from lowbit.formats import Format
from lowbit.formats._gguf import arch_of
from lowbit.stages._told import Config, open_facts
from lowbit.stages.budgets.check import Case
from lowbit.stages.budgets.sensitivity import Losses, Offers
from lowbit.stages.budgets.solve import Limit, closest, solve
from lowbit.stages.checkpoint import Checkpoint, arch_rows
from lowbit.stages.plan import Entry, Plan, Rules, make_plan
from lowbit.stages.running import Forecast, Running, Use, forecast, uses_of
from lowbit.stages.write import make_shards
from lowbit.tensors import scheme_bytes

_ROUNDS = 5
_SHOWN = 10
NATS = "nats per token"  # of divergence: the unit of losses that are one


@final
@dataclass(frozen=True)
class Budget:
    """What the user asked for; one of the first five, `latency` alone or beside one of the first three.

    Attributes:
        bits: mean bits of the weights that take part, scales included.
        size: bytes of the weight files.
        memory: bytes at run time: weights, cache and what a pass works with.
        kl: most divergence from the original, nats per token.
        perplexity: most relative increase of the perplexity, 0.01 for 1%.
        measure: name of what sensitivity is, of `measures.py`.
        schemes: names of those to choose from; none for the format's usual ones.
        sensitivity: file to take the measurement from, or to save it in.
        fused: layers that runtimes join get one scheme.
        latency: seconds of one step of decoding; `asked`: how the user said it.
        running: what memory and seconds are worked out for; None where neither is asked for.
        check: decisions that were nearest to another one, of which the true divergence is measured.
        beside: that is what they add to the divergence of the plan without them, not of each alone.
        narrow: schemes of inputs and of the cache, of which the cost is measured too.
        rounding: most that rounding inputs to the scheme of the rules may be predicted to cost; None for no limit.
    """

    bits: float | None = None
    size: int | None = None
    memory: int | None = None
    kl: float | None = None
    perplexity: float | None = None
    schemes: tuple[str, ...] = ()
    sensitivity: Path | None = None
    fused: bool = True
    latency: float | None = None
    asked: str = "--latency"
    running: Running | None = None
    check: int = 0
    beside: bool = False
    narrow: tuple[str, ...] = ()
    rounding: float | None = None
    measure: str = "fisher"

    @property
    def decides(self) -> bool:
        """Whether anything is limited, so that schemes are chosen."""
        limits = (self.bits, self.size, self.memory, self.kl, self.perplexity, self.latency)
        return any(limit is not None for limit in limits)

    @property
    def quality(self) -> float | None:
        """Most divergence, or most relative increase of the perplexity, that the whole may be measured to have."""
        return self.perplexity if self.kl is None else self.kl

    def choices(self, form: str) -> tuple[str, ...]:
        """The schemes to choose from."""
        return self.schemes or _USUAL.get(plugins.load("formats", form).container, _USUAL["safetensors"])


_USUAL = {
    "gguf": ("iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
    "safetensors": ("int2-g64-asym", "int3-g128", "int4-g128", "int4-g32", "int8-g128"),
}


@final
@dataclass(frozen=True)
class Allocation:
    """A plan, the divergence that is predicted for it in nats per token, and the bytes of its weight files.

    `chosen` has the scheme of each weight that was decided, as it is called on offer; `caches` the types of the cache
    that were to be chosen from, with loss and bytes of each, the chosen one first.
    """

    plan: Plan
    loss: float
    size: int
    chosen: Mapping[str, str] = field(default_factory=dict)
    forecast: Forecast | None = None
    caches: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    unit: str = NATS

    @property
    def predicted(self) -> str:
        """The loss with its unit, and whether that is a divergence."""
        return f"{self.loss:.3g} {self.unit}" + ("" if self.unit == NATS else ", which is no divergence")

    def lines(self) -> Iterator[str]:
        """What is said of it."""
        of = " of divergence from the original" if self.unit == NATS else ""
        yield f"plan of {format_size(self.size)}, predicted {self.predicted}{of}"
        if len(self.caches) > 1:
            said = [f"{name} {loss:.2g} nats, {format_size(size)}" for name, (loss, size) in self.caches.items()]
            yield f"cache: {said[0]}; not {'; '.join(said[1:])}"
        yield from self.forecast.lines() if self.forecast else ()


@final
@dataclass(frozen=True)
class Checked:
    """What measuring the nearest decisions gave.

    Attributes:
        decisions: that were measured.
        ratio: of measured to predicted divergences, the median.
        changed: weights that have another scheme than before, with both.
        beside: whether each was measured beside the rest of the plan, not alone.
    """

    decisions: int
    ratio: float
    changed: Mapping[str, tuple[str, str]]
    beside: bool = False

    def lines(self) -> Iterator[str]:
        """What is said of it."""
        yield (
            f"check: {self.decisions} decisions measured, {'beside the rest of the plan' if self.beside else 'alone'}: "
            f"divergences {self.ratio:.3g} times what was predicted in the median; {len(self.changed)} weights changed "
            "their scheme"
        )
        for name, (before, after) in list(self.changed.items())[:_SHOWN]:
            yield f"  {name}: {before} -> {after}"
        if len(self.changed) > _SHOWN:
            yield f"  and {len(self.changed) - _SHOWN} more"


@final
@dataclass(frozen=True)
class Problem:
    """Everything but the budget.

    Attributes:
        groups: names of weights that get one scheme.
        choices: for each group, the schemes that all of it can have.
        undecided: the plan before anything is chosen.
        kept: what keeping all keys and values in a scheme is predicted to cost.
        unit: of the losses.
    """

    source: Checkpoint
    rules: Rules
    offers: Offers
    losses: Losses
    groups: tuple[tuple[str, ...], ...]
    choices: tuple[tuple[str, ...], ...]
    undecided: Plan
    kept: Mapping[str, float] = field(default_factory=dict)
    unit: str = NATS

    def within(self, budget: Budget) -> Allocation:
        """The best plan of so many bits per weight, bytes of files or of memory, or seconds of a token.

        Raises:
            UsageError: the smallest of the schemes are over a budget; the text has what they take.
            UnsupportedError: a model whose memory is not worked out here.
        """
        limits, running = self._as_it_runs(budget), budget.running
        ways = running.ways if running else ()
        if budget.bits is not None:
            found = self.within_bits(budget.bits, *limits, ways=ways)
        elif budget.size is not None:
            found = self.within_size(budget.size, *limits, ways=ways)
        else:
            first, *others = limits
            found = self._made(solve(self._losses(ways), first.sizes, first.most, *others).picked, ways)
        if running is None:
            return found
        way = next(way for way in ways if way.cache == next(iter(found.caches)))
        return replace(found, forecast=forecast(found.plan, self._config, way, budget.memory, budget.latency))

    def nearest(self, budget: Budget, found: Allocation) -> list[Case]:
        """The decisions of a plan that were nearest to another: the weights of each, in its scheme and in the other."""
        chosen = [found.chosen[group[0]] for group in self.groups]
        picked = [row.index(scheme) for row, scheme in zip(self.choices, chosen, strict=True)]
        near = closest(self._losses(), self._use(budget), picked, budget.check)
        return [Case(self.groups[item], self.choices[item][at]) for item, other in near for at in (picked[item], other)]

    def _use(self, budget: Budget) -> list[list[float]]:
        """What each choice takes of the budgets, as a share of them, added up."""
        limits = self._as_it_runs(budget)
        nothing = _nothing(budget.running.ways if budget.running else ())
        if budget.bits is not None:
            limits.append(Limit(self._coded + nothing, budget.bits * self._count))
        if budget.size is not None:
            limits.append(Limit(self._stored + nothing, float(budget.size)))
        tables = [[[size / limit.most for size in row] for row in limit.sizes] for limit in limits]
        shares = [[sum(parts) for parts in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]
        return shares[: len(self.groups)]

    def corrected(self, cases: Sequence[Case], measured: Sequence[float]) -> tuple[Problem, float]:
        """With what was measured in the place of what was predicted, and the median of the ratios.

        All other losses are multiplied by that ratio, so that what was measured is not favoured for being smaller
        throughout, and so that losses of another unit become divergences; the measured loss of weights that were
        replaced together is shared as the predicted one was.
        """
        predicted = [sum(self.losses[name][case.scheme] for name in case.names) for case in cases]
        ratios = [new / old for new, old in zip(measured, predicted, strict=True) if old > 0]
        ratio = median(ratios) if ratios else 1.0
        losses = {name: {s: ratio * loss for s, loss in row.items()} for name, row in self.losses.items()}
        for case, new, old in zip(cases, measured, predicted, strict=True):
            for name in case.names if old > 0 else ():
                losses[name][case.scheme] = self.losses[name][case.scheme] * new / old
        kept = {scheme: ratio * loss for scheme, loss in self.kept.items()}
        return replace(self, losses=losses, kept=kept, unit=NATS), ratio

    def within_bits(self, bits: float, *also: Limit, ways: Sequence[Running] = ()) -> Allocation:
        """The best plan of so many bits per weight, and which of the ways to run it."""
        sizes, count = self._coded + _nothing(ways), self._count
        least = sum(map(min, sizes)) / max(count, 1)
        if least > bits:
            raise UsageError(f"--bits-per-weight {bits:g}: the smallest of --schemes take {least:.4f} together")
        return self._made(solve(self._losses(ways), sizes, bits * count, *also).picked, ways)

    def within_size(self, size: int, *also: Limit, ways: Sequence[Running] = ()) -> Allocation:
        """The best plan whose weight files take at most so many bytes, and which of the ways to run it."""
        sizes, smallest = self._stored + _nothing(ways), self.smallest(ways)
        if smallest.size > size:
            raise UsageError(f"--size {size:,} bytes: with the smallest of --schemes the model takes {smallest.size:,}")
        room = size - (smallest.size - sum(map(min, sizes)))
        for _ in range(_ROUNDS):
            found = self._made(solve(self._losses(ways), sizes, max(room, sum(map(min, sizes))), *also).picked, ways)
            if found.size <= size:
                return found
            room -= found.size - size  # headers of another length
        if also:
            raise UsageError(f"--size {size:,} bytes is so near to what files with the least headers take that no plan "
                             "was found that is as fast as asked; raise it")  # fmt: skip
        return smallest

    def _as_it_runs(self, budget: Budget) -> list[Limit]:
        """The budgets of memory at run time and of a token's time."""
        running, found = budget.running, list[Limit]()
        if running and budget.memory is not None:
            found.append(self._memory(running, budget.memory))
        if running and budget.latency is not None:
            found.append(self._seconds(running, budget.latency, budget.asked))
        return found

    def _memory(self, running: Running, memory: int) -> Limit:
        """Bytes at run time that each choice takes, and what the rest leaves for them."""
        weights, fixed = self._running(running.held, running.batch)
        sizes = [*weights, [float(way.beside(self._config)[0]) for way in running.ways]]
        cache, working = int(min(sizes[-1])), running.beside(self._config)[1]
        least = sum(map(min, sizes)) + fixed + working
        if least > memory:
            parts = {"weights": int(least) - cache - working, "cache": cache, "working": working}
            raise UsageError(
                f"--memory {format_size(memory)}: with the smallest of --schemes {running.runtime} needs "
                f"{format_size(int(least))} = {format_sum(parts)}; fewer tokens (--run-context) or sequences "
                "(--run-batch) need less"
            )
        return Limit(sizes, float(memory - fixed - working))

    def _seconds(self, running: Running, latency: float, asked: str) -> Limit:
        """Seconds of a step of decoding that each choice takes, and what the rest leaves for them."""
        weights, fixed = self._running(running.seconds, running.batch)
        times = [*weights, [way.beside(self._config)[0] / running.bandwidth for way in running.ways]]
        least, remembering = sum(map(min, times)) + fixed, min(times[-1])
        if least > latency:
            raise UsageError(
                f"{asked}: with the fastest of --schemes a token takes {1e3 * least:.4g}ms on {running.machine} "
                f"({1 / least:.4g} a second), weights {1e3 * (least - remembering):.4g}ms and cache "
                f"{1e3 * remembering:.4g}ms"
            )
        return Limit(times, latency - fixed)

    def _running(self, of: Callable[[Use], float], tokens: int) -> tuple[list[list[float]], float]:
        """For each group and scheme the sum of what its weights take as they run; and the sum over all others."""
        plan = self.undecided
        uses = uses_of(plan, self._config, tokens)

        def taken(name: str, scheme: str) -> float:
            entry = self.offers[name][scheme]
            return float(of(replace(uses[name], entry=entry, stored=plan.stored_bytes(entry))))

        chosen = {name for group in self.groups for name in group}
        return self._sums(taken), float(sum(of(use) for name, use in uses.items() if name not in chosen))

    @cached_property
    def _count(self) -> int:
        """Of the weights that take part."""
        return sum(prod(self._entry(name).weight.shape) for group in self.groups for name in group)

    @cached_property
    def _config(self) -> Config:
        return open_facts(self.source)

    def within_loss(self, loss: float) -> Allocation:
        """The smallest plan whose predicted divergence is at most this."""
        losses = self._losses()
        return self._made(solve(self._stored, losses, max(loss, sum(map(min, losses)))).picked)

    def smallest(self, ways: Sequence[Running] = ()) -> Allocation:
        """The plan of fewest bytes."""
        return self._made([row.index(min(row)) for row in self._stored + _nothing(ways)], ways)

    def _made(self, picked: Sequence[int], ways: Sequence[Running] = ()) -> Allocation:
        """The plan of these choices, of which the last is a way to run it, where there are any."""
        chosen = {
            name: schemes[at]
            for group, schemes, at in zip(self.groups, self.choices, picked, strict=False)
            for name in group
        }
        found = self.allocation(chosen)
        if not ways:
            return found
        losses, order = self._losses(ways)[-1], [picked[-1], *(at for at in range(len(ways)) if at != picked[-1])]
        caches = {ways[at].cache: (losses[at], ways[at].beside(self._config)[0]) for at in order}
        return replace(found, loss=found.loss + losses[picked[-1]], caches=caches)

    def allocation(self, chosen: Mapping[str, str]) -> Allocation:
        """The plan in which weights have these schemes."""
        given = {name: (scheme, f"predicted, in {self.unit}") for name, scheme in chosen.items()}
        given |= {name: ("keep", "none of the schemes on offer fits it") for name in self.offers if name not in given}
        plan = make_plan(self.source, self.rules, given)
        costs = {name: self._costs(name, scheme) for name, scheme in chosen.items()}
        plan = replace(plan, entries=tuple(replace(e, costs=costs.get(e.weight.name, {})) for e in plan.entries))
        size = sum(shard.nbytes for shard in make_shards(plan, None, self.source))
        return Allocation(
            plan, sum(self.losses[name][scheme] for name, scheme in chosen.items()), size, chosen, unit=self.unit
        )

    def _costs(self, name: str, scheme: str) -> dict[str, float]:
        """What this scheme costs, and what its neighbours by size would."""
        row, names = self.losses[name], sorted(self.losses[name], key=lambda each: _bytes(self.offers[name][each]))
        at = names.index(scheme)
        return {each: row[each] for each in (scheme, *names[max(at - 1, 0) : at], *names[at + 1 : at + 2])}

    def _entry(self, name: str) -> Entry:
        return next(iter(self.offers[name].values()))

    def _losses(self, ways: Sequence[Running] = ()) -> list[list[float]]:
        """Of each choice of each group; and of each way to run the plan, where there are any."""
        kept = [[0.0, *(self.kept[each.scheme] for each in ways[0].others)]] if ways else []
        return self._sums(lambda name, scheme: self.losses[name][scheme]) + kept

    @cached_property
    def _coded(self) -> list[list[float]]:
        """Bits of codes, scales and zero points."""
        return self._sums(lambda name, scheme: 8 * _bytes(self.offers[name][scheme]))

    @cached_property
    def _stored(self) -> list[list[float]]:
        """Bytes in the file; each round of a search asks for them."""
        return self._sums(lambda name, scheme: self.undecided.stored_bytes(self.offers[name][scheme]))

    def _sums(self, of: Callable[[str, str], float]) -> list[list[float]]:
        """For each group and scheme the sum over the group."""
        pairs = zip(self.groups, self.choices, strict=True)
        return [[float(sum(of(name, scheme) for name in group)) for scheme in schemes] for group, schemes in pairs]


def _nothing(ways: Sequence[Running]) -> list[list[float]]:
    """What the ways to run a plan take of its bits and bytes."""
    return [[0.0] * len(ways)] if ways else []


def undecided(source: Checkpoint, rules: Rules, offers: Offers) -> Plan:
    """The plan before anything on offer is chosen: no scheme has to fit yet."""
    return make_plan(source, rules, dict.fromkeys(offers, ("keep", "")))


def make_problem(
    source: Checkpoint,
    rules: Rules,
    offers: Offers,
    losses: Losses,
    fused: bool,
    plan: Plan,
    kept: Mapping[str, float] = MappingProxyType({}),
    unit: str = NATS,
) -> Problem:
    """Group the weights that must agree.

    Args:
        plan: in which nothing is chosen yet.
        kept: what keeping all keys and values in a scheme is predicted to cost.

    Raises:
        UsageError: no weight can have any of the schemes.
    """
    groups: dict[str, list[str]] = {}
    for name in offers:
        groups.setdefault(group_of(source, rules, name, fused), []).append(name)
    choices = {
        key: [s for s in losses[names[0]] if all(s in losses[n] for n in names)] for key, names in groups.items()
    }
    open_ = [key for key in groups if choices[key]]
    if not open_:
        raise UsageError(f"no weight of {source.path} can have any of the schemes on offer in {rules.format}")
    return Problem(
        source, rules, offers, losses,
        tuple(tuple(groups[key]) for key in open_), tuple(tuple(choices[key]) for key in open_),
        plan, kept, unit,
    )  # fmt: skip


def group_of(source: Checkpoint, rules: Rules, name: str, fused: bool) -> str:
    """What weights that must have one scheme have in common."""
    form: Format = plugins.load("formats", rules.format)
    if form.container == "gguf":
        arch = arch_of(source.config)
        place = arch.place(name) if arch else None
        return place.name if place else name
    if form.container == "safetensors" and fused:
        for row in arch_rows("fused"):
            name = re.sub(row["pattern"], row["into"], name)
    return name


def _bytes(entry: Entry) -> int:
    """Of codes, scales and zero points; of the weight itself where it stays as it is."""
    if entry.weight.scheme is None:
        return entry.source_bytes
    return scheme_bytes(entry.weight.scheme, entry.weight.shape)
