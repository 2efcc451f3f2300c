"""Allocate: which scheme each weight gets, so that the predicted loss is least under a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import final

from lowbit import plugins
from lowbit.errors import UsageError
from lowbit.formats import Format
from lowbit.formats._gguf import arch_of
from lowbit.stages.checkpoint import Checkpoint, arch_rows
from lowbit.stages.plan import Entry, Plan, Rules, make_plan
from lowbit.stages.sensitivity import Losses, Offers
from lowbit.stages.solve import solve
from lowbit.stages.write import make_shards
from lowbit.tensors import scheme_bytes

_ROUNDS = 5


@final
@dataclass(frozen=True)
class Budget:
    """What the user asked for; one of the first four.

    Attributes:
        bits: mean bits of the weights that take part, scales included.
        size: bytes of the weight files.
        kl: most divergence from the original, nats per token.
        perplexity: most relative increase of the perplexity, 0.01 for 1%.
        schemes: names of those to choose from; none for the format's usual ones.
        sensitivity: file to take the measurement from, or to save it in.
        fused: layers that runtimes join get one scheme.
    """

    bits: float | None = None
    size: int | None = None
    kl: float | None = None
    perplexity: float | None = None
    schemes: tuple[str, ...] = ()
    sensitivity: Path | None = None
    fused: bool = True

    def choices(self, form: str) -> tuple[str, ...]:
        """The schemes to choose from."""
        return self.schemes or _USUAL.get(plugins.load("formats", form).container, _USUAL["safetensors"])


_USUAL = {
    "gguf": ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
    "safetensors": ("int2-g64-asym", "int3-g128", "int4-g128", "int4-g32", "int8-g128"),
}


@final
@dataclass(frozen=True)
class Allocation:
    """A plan, the divergence that is predicted for it in nats per token, and the bytes of its weight files."""

    plan: Plan
    loss: float
    size: int


@final
@dataclass(frozen=True)
class Problem:
    """Everything but the budget.

    Attributes:
        groups: names of weights that get one scheme.
        choices: for each group, the schemes that all of it can have.
    """

    source: Checkpoint
    rules: Rules
    offers: Offers
    losses: Losses
    groups: tuple[tuple[str, ...], ...]
    choices: tuple[tuple[str, ...], ...]

    def within_bits(self, bits: float) -> Allocation:
        """The best plan of so many bits per weight."""
        count = sum(prod(self._entry(name).weight.shape) for group in self.groups for name in group)
        sizes = self._sums(lambda name, scheme: 8 * _bytes(self.offers[name][scheme]))
        least = sum(map(min, sizes)) / max(count, 1)
        if least > bits:
            raise UsageError(f"--bits-per-weight {bits:g}: the smallest of --schemes take {least:.4f} together")
        return self._made(solve(self._losses(), sizes, bits * count).picked)

    def within_size(self, size: int) -> Allocation:
        """The best plan whose weight files take at most so many bytes."""
        sizes, smallest = self._stored, self.smallest()
        if smallest.size > size:
            raise UsageError(f"--size {size:,} bytes: with the smallest of --schemes the model takes {smallest.size:,}")
        room = size - (smallest.size - sum(map(min, sizes)))
        for _ in range(_ROUNDS):
            found = self._made(solve(self._losses(), sizes, max(room, sum(map(min, sizes)))).picked)
            if found.size <= size:
                return found
            room -= found.size - size  # headers of another length
        return smallest

    def within_loss(self, loss: float) -> Allocation:
        """The smallest plan whose predicted divergence is at most this."""
        losses = self._losses()
        return self._made(solve(self._stored, losses, max(loss, sum(map(min, losses)))).picked)

    def smallest(self) -> Allocation:
        """The plan of fewest bytes."""
        sizes = self._stored
        return self._made([row.index(min(row)) for row in sizes])

    def _made(self, picked: Sequence[int]) -> Allocation:
        """The plan of these choices."""
        chosen = {
            name: schemes[at]
            for group, schemes, at in zip(self.groups, self.choices, picked, strict=True)
            for name in group
        }
        return self.allocation(chosen)

    def allocation(self, chosen: Mapping[str, str]) -> Allocation:
        """The plan in which weights have these schemes."""
        given = {name: (scheme, self._reason(name, scheme)) for name, scheme in chosen.items()}
        given |= {name: ("keep", "none of the schemes on offer fits it") for name in self.offers if name not in given}
        plan = make_plan(self.source, self.rules, given)
        size = sum(shard.nbytes for shard in make_shards(plan, None, self.source))
        return Allocation(plan, sum(self.losses[name][scheme] for name, scheme in chosen.items()), size)

    def _reason(self, name: str, scheme: str) -> str:
        """What this scheme costs, and what its neighbours by size would."""
        row, names = self.losses[name], sorted(self.losses[name], key=lambda each: _bytes(self.offers[name][each]))
        at = names.index(scheme)
        others = [f"{each} {row[each]:.2g}" for each in (names[max(at - 1, 0) : at] + names[at + 1 : at + 2])]
        return f"costs {row[scheme]:.2g} nats" + (f"; {', '.join(others)}" if others else "")

    def _entry(self, name: str) -> Entry:
        return next(iter(self.offers[name].values()))

    def _losses(self) -> list[list[float]]:
        return self._sums(lambda name, scheme: self.losses[name][scheme])

    @cached_property
    def _stored(self) -> list[list[float]]:
        """Bytes in the file; each takes a plan, and each round of a search asks for them."""
        plan = undecided(self.source, self.rules, self.offers)
        return self._sums(lambda name, scheme: plan.stored_bytes(self.offers[name][scheme]))

    def _sums(self, of: Callable[[str, str], float]) -> list[list[float]]:
        """For each group and scheme the sum over the group."""
        pairs = zip(self.groups, self.choices, strict=True)
        return [[float(sum(of(name, scheme) for name in group)) for scheme in schemes] for group, schemes in pairs]


def undecided(source: Checkpoint, rules: Rules, offers: Offers) -> Plan:
    """The plan before anything on offer is chosen: no scheme has to fit yet."""
    return make_plan(source, rules, dict.fromkeys(offers, ("keep", "")))


def make_problem(source: Checkpoint, rules: Rules, offers: Offers, losses: Losses, fused: bool) -> Problem:
    """Group the weights that must agree.

    Raises:
        UsageError: no weight can have any of the schemes.
    """
    groups: dict[str, list[str]] = {}
    for name in offers:
        groups.setdefault(_group(source, rules, name, fused), []).append(name)
    choices = {
        key: [s for s in losses[names[0]] if all(s in losses[n] for n in names)] for key, names in groups.items()
    }
    open_ = [key for key in groups if choices[key]]
    if not open_:
        raise UsageError(f"no weight of {source.path} can have any of the schemes on offer in {rules.format}")
    return Problem(
        source, rules, offers, losses,
        tuple(tuple(groups[key]) for key in open_), tuple(tuple(choices[key]) for key in open_),
    )  # fmt: skip


def _group(source: Checkpoint, rules: Rules, name: str, fused: bool) -> str:
    """What weights that must have one scheme have in common."""
    form: Format = plugins.load("formats", rules.format)
    if form.container == "gguf":
        arch = arch_of(source.config.get("model_type"))
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
