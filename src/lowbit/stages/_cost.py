"""What a calibrated run will take: memory, time and disk, estimated before it starts, and a way of working that fits.

Memory is added up from what a block holds at its worst moment. Time is counted in multiplications and divided by the
rate at which this machine multiplied matrices a moment ago.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import ceil, prod
from typing import final

import torch
from torch import Tensor

from lowbit import plugins
from lowbit.budget import MARGIN, PIECE, anonymous_bytes, format_size, format_sum
from lowbit.corrections import Correction
from lowbit.errors import ResourceError
from lowbit.methods import Method
from lowbit.methods._attention import kept_bytes
from lowbit.stages._model import Blueprint
from lowbit.stages._pages import MAPPED
from lowbit.stages._recipe import Recipe, step_options
from lowbit.stages._streams import stream_kinds
from lowbit.stages._words import duration
from lowbit.stages.plan import Entry, Plan
from lowbit.stages.quantize import one_torch_thread
from lowbit.stats import Statistic
from lowbit.transforms import Transform

_TOKENS = 4096
# Of slopes: tokens that methods learn from, at least and for each channel of the stream, tokens that judge; tokens that
# go back through a block at once; logits that are held together, and copies of them.
_SLOPED, _FOR_EACH, _JUDGED = 8192, 4, 2048
BACK, LOGITS, _COPIES = 1024, 2**24, 4
_JUDGE = 1024 * 4  # bytes per input of the rows that judge
EMBEDDED = 8192  # tokens that are embedded together
# Of the upper estimate of activations: what is there at once of a forward pass, and what the graph of a backward pass
# and what goes along it take. And what a heap comes to have of holes. Measured on blocks of 0.8, 13 and 44 million
# weights.
_LIVE, _GRAPH = 0.3, 0.8
_HOLES = 256 * 2**20
_LEARNED = 20  # bytes per weight that is learned: its groups, their shifts, what is made of them, and its derivative
_RIVALS = 40  # bytes per weight of a piece: the candidates beside the method's own, and their errors


@final
@dataclass(frozen=True)
class Cost:
    """Estimate of a calibrated run.

    Attributes:
        base: bytes that the process holds before it starts.
        block: bytes of a block's weights, with copies that the recipe needs.
        activations: bytes while a batch of windows runs through it.
        statistics: bytes of what is accumulated and prepared at once.
        workspace: bytes of the pieces of weights that are being quantized.
        disk: bytes of hidden states.
        seconds: of the stage.
        tokens: per batch.
        piece: weight elements that a worker takes at a time.
        threads: workers.
        sites: experts whose statistics are accumulated at once.
    """

    base: int
    block: int
    activations: int
    statistics: int
    workspace: int
    disk: int
    seconds: float
    tokens: int
    piece: int
    threads: int
    sites: int

    @property
    def total(self) -> int:
        """Bytes of anonymous memory in all: quantizing comes after the batches of a step."""
        return self.base + self.block + self.statistics + max(self.activations, self.workspace)

    def __str__(self) -> str:
        parts = {"process": self.base, "block": self.block, "statistics": self.statistics}
        last = "activations" if self.activations > self.workspace else "working memory"
        parts[last] = self.total - sum(parts.values())
        disk = f"{format_size(self.disk)} of disk while it runs"
        return f"{format_size(self.total)} = {format_sum(parts)}; {disk}; about {duration(self.seconds)}"


@final
@dataclass(frozen=True)
class Outside:
    """Entries of weights outside of the blocks that calibration makes, by name.

    Attributes:
        tables: of embeddings.
        heads: of output layers that are no embeddings, where the method learns from text.
    """

    tables: Mapping[str, Entry]
    heads: Mapping[str, Entry]

    @property
    def names(self) -> AbstractSet[str]:
        """Of all."""
        return self.tables.keys() | self.heads.keys()

    @property
    def sloped(self) -> bool:
        """Whether slopes are taken for one."""
        return any(map(needs_of, self.tables.values()))


def outside_of(plan: Plan, blueprint: Blueprint) -> Outside:
    """The weights of a plan that calibration makes outside of the blocks."""
    planned = {entry.weight.name: entry for entry in plan.entries if entry.weight.scheme and not entry.tied}
    looked, read = (frozenset[str]().union(*found.values()) for found in (blueprint.tables, blueprint.layers))
    tables = {name: entry for name, entry in planned.items() if name in looked}
    heads = {name: entry for name, entry in planned.items() if name in read - looked and needs_of(entry)}
    return Outside(tables, heads)


def needs_of(entry: Entry) -> frozenset[str]:
    """Names of the statistics that the method of a weight needs."""
    method: Method | None = plugins.load("methods", entry.method) if entry.method else None
    return method.needs if method else frozenset()


def sloped_windows(fit: int, held: int, length: int, width: int) -> tuple[int, int]:
    """Windows whose slopes are taken, of so many to learn from and to judge by, of so many tokens."""
    return min(max(max(_SLOPED, _FOR_EACH * width) // length, 1), fit), min(max(_JUDGED // length, 1), held)


def estimate(
    plan: Plan, recipe: Recipe, blueprint: Blueprint, windows: tuple[int, int], limit: int | None, threads: int
) -> Cost:
    """The fastest way of working that fits the limit: smaller batches, smaller pieces, fewer workers.

    Args:
        windows: number of windows, and tokens of each.
        limit: bytes of anonymous memory allowed; None for no limit.
        threads: workers wanted.

    Raises:
        ResourceError: nothing fits; the text names the least limit that works.
    """
    facts = _Facts(plan, recipe, blueprint, windows)
    ways = list(_ways(facts, threads))
    for way in ways:
        if limit is None or way.total <= limit:
            return replace(way, seconds=facts.seconds(way))
    least = min(ways, key=lambda way: way.total)
    least = replace(least, seconds=facts.seconds(least))
    raise ResourceError(
        f"--ram {format_size(limit or 0)} is too little: this plan needs at least {format_size(least.total)} ({least})"
    )


def _ways(facts: _Facts, threads: int) -> Iterator[Cost]:
    """Ways of working, fastest first."""
    length = facts.windows[1]
    batches = dict.fromkeys(max(size, length) for size in (_TOKENS, 2048, length))
    for workers in dict.fromkeys((1,) if facts.elsewhere else (threads, 1)):
        for piece in [*facts.whole, *(PIECE >> shift for shift in (0, 2, 4))]:
            for tokens in batches:
                for sites in dict.fromkeys((facts.experts, min(facts.experts, 8), 1)):
                    yield facts.cost(tokens, piece, workers, sites)


@final
class _Facts:
    """What the estimate is made of."""

    def __init__(self, plan: Plan, recipe: Recipe, blueprint: Blueprint, windows: tuple[int, int]) -> None:
        self.plan, self.recipe, self.blueprint, self.windows = plan, recipe, blueprint, windows
        self.method: Method = plugins.load("methods", recipe.method)
        self.transforms: list[Transform] = [plugins.load("transforms", name) for name in recipe.transforms]
        self.corrections: list[Correction] = [plugins.load("corrections", name) for name in recipe.corrections]
        by_name = {entry.weight.name: entry for entry in plan.entries}
        inside = [[by_name[name] for name in names if name in by_name] for names in blueprint.blocks.values()]
        self.blocks = [[entry for entry in entries if entry.weight.scheme] for entries in inside]
        self.largest = max(self.blocks, key=lambda entries: sum(prod(entry.weight.shape) for entry in entries))
        self.targets = sum(prod(entry.weight.shape) for entry in self.largest)
        self.ends = outside_of(plan, blueprint)
        self.outside = [*self.ends.tables.values(), *self.ends.heads.values()]
        self.experts = max(sum(".experts." in e.weight.name for e in self.largest) // 2, 1)
        for dtype in {blueprint.dtype, torch.float32}:
            for alone in (True, False):
                rate(dtype, alone=alone)  # what the libraries take with their first product is no part of the margin
        self.base = anonymous_bytes() + MARGIN
        made = [*(entry for entries in self.blocks for entry in entries), *self.outside]
        others = {entry.method for entry in made if entry.method} - {recipe.method}
        self.methods: list[Method] = [self.method, *(plugins.load("methods", name) for name in others)]
        steps: list[Method | Transform | Correction] = [*self.methods, *self.transforms, *self.corrections]
        names = frozenset[str]().union(*(step.needs for step in steps))
        self.statistics: list[Statistic] = [plugins.load("stats", name) for name in names]
        self.paired = any(statistic.paired for statistic in self.statistics)
        self.floats = bool(self.method.learn or self.transforms)
        self.informed = recipe.informed(plan.options)
        self.sloped = self.ends.sloped or self.informed

    @property
    def wide(self) -> int:
        """Inputs of the widest weight."""
        return max((entry.weight.shape[-1] for entry in (*self.largest, *self.outside)), default=0)

    @property
    def heaviest(self) -> int:
        """Elements of the largest weight."""
        return max((prod(entry.weight.shape) for entry in (*self.largest, *self.outside)), default=0)

    @property
    def device(self) -> str:
        """Where blocks run."""
        return self.plan.calibration.device if self.plan.calibration else "cpu"

    @property
    def elsewhere(self) -> bool:
        """Whether the method computes on another device, where workers would only wait for each other."""
        return self.method.anywhere and self.device != "cpu"

    @property
    def whole(self) -> list[int]:
        """A piece for the largest weight: on a device, time goes with the number of operations, not with their size."""
        return [self.heaviest] if self.elsewhere and self.heaviest > PIECE else []

    def cost(self, tokens: int, piece: int, threads: int, sites: int) -> Cost:
        """Of one way of working."""
        block = self.blueprint.block_bytes * (2 if self.paired else 1) + 4 * self.targets * self.floats + self._terms()
        if self.method.learn:
            block += (_LEARNED + 4 * (threads - 1)) * self.targets  # each worker has its own derivatives
        block += 12 * self.targets * bool(self._back())  # weights as they are rounded, their derivatives, and one more
        block += 4 * self.targets * bool(self.transforms and self.experts > 1)  # all experts rounded for a candidate
        batch = max(min(tokens, prod(self.windows)), self.windows[1])
        held = sum(statistic.nbytes(self.wide) for statistic in self.statistics)
        prepared = max(method.prepared(self.wide) for method in self.methods)
        workspace = max(method.workspace for method in self.methods)
        parts = int((workspace + _RIVALS) * min(piece, self.heaviest)) * threads
        step = sum(sorted(prod(entry.weight.shape) for entry in self.largest)[-3:])
        parts += 3 * max(step, *(prod(entry.weight.shape) for entry in self.outside), 0)
        streams = len(stream_kinds(self.recipe, self.plan.calibration.inputs if self.plan.calibration else "quantized"))
        size = prod(self.windows) * self.blueprint.dtype.itemsize
        return Cost(
            self.base,
            block,
            self._activations(batch, threads),
            max(sites * (held + _JUDGE * self.wide), prepared + _JUDGE * self.wide),
            max(parts, self._fitting()),
            size * (2 * streams * self.blueprint.width + self._known() + self.paired * self.blueprint.attended)
            + self._tables()
            + self._slopes() * (len(self.blueprint.blocks) + 1)
            + 4 * self.blueprint.width**2 * len(self.blueprint.blocks) * self.informed,
            0.0,
            batch,
            piece,
            threads,
            sites,
        )

    def _activations(self, batch: int, threads: int) -> int:
        """Bytes while tokens are embedded and go forward through a block, or some windows go back."""
        (count, length), size = self.windows, self.blueprint.dtype.itemsize
        tokens, token = count * length, self._token
        embedded = 2 * min(EMBEDDED, tokens) * self.blueprint.width * size
        forward = int(_LIVE * min(threads * batch, tokens) * token) + self._holes(batch, ceil(tokens / batch))
        learned = min(self.method.batch(self._options()), count)
        kept = 2 * threads * kept_bytes(ceil(learned / threads), self.blueprint.heads, length, size)
        back = length * max(learned, min(self._back(), count))
        learned = int(_GRAPH * back * token) + kept + self._holes(ceil(back / threads), 2)
        return max(embedded + forward, learned, self._going_back())

    @property
    def _shortened(self) -> bool:
        """Whether passes for later steps are not run again as far as earlier ones went (`_shortcuts`)."""
        return self.device == "cpu" and not self.method.learn

    def _known(self) -> int:
        """Values of a token that passes keep: what the last layer of each part of the largest block reads."""
        if not self._shortened:
            return self.blueprint.attended
        parts: defaultdict[str, list[int]] = defaultdict(list)
        for entry in self.largest:
            path = entry.weight.name.removesuffix(".weight").rpartition(".")[0]
            if not path.rpartition(".")[2].isdigit():  # neither the block nor an expert
                parts[path].append(entry.weight.shape[-1])
        return max(sum(max(inputs) for inputs in parts.values() if len(inputs) > 1), self.blueprint.attended)

    def _going_back(self) -> int:
        """Bytes while slopes are taken: of windows that go back through a block, and of logits."""
        size, token = max(BACK, self.windows[1]), self.blueprint.token_bytes(self.windows[1])
        logits = 4 * _COPIES * min(LOGITS, self.windows[1] * self.blueprint.vocabulary)
        moment: Statistic = plugins.load("stats", "second_moment")
        kept = moment.nbytes(self.blueprint.width) * self.informed
        return (self._slopes() + kept + max(int(_GRAPH * size * token), logits)) * self.sloped

    def _slopes(self) -> int:
        """Bytes of slopes at one block."""
        return self._sloped * self.blueprint.width * self.blueprint.dtype.itemsize

    @property
    def _sloped(self) -> int:
        """Tokens whose slopes are taken."""
        count, length = self.windows
        fit, held = sloped_windows(count, count, length, self.blueprint.width)
        return min(fit + held, count) * length * self.sloped

    def _tables(self) -> int:
        """Bytes of embeddings as the blocks see them."""
        return sum(prod(entry.weight.shape) for entry in self.ends.tables.values()) * self.blueprint.dtype.itemsize

    def _holes(self, tokens: int, passes: int) -> int:
        """Bytes of a heap that no tensor fits, after passes of so many tokens; large ones are mapped and leave none."""
        if tokens * self.wide * self.blueprint.dtype.itemsize >= MAPPED:
            return 0
        return min(tokens * min(passes, 2) * self._token, _HOLES)

    @cached_property
    def _token(self) -> int:
        """Bytes of a token's activations in a block, at most."""
        return self.blueprint.token_bytes(self.windows[1], inside=True)

    def _back(self) -> int:
        """Most windows that a transform takes back through the block at once."""
        return max((t.batch(step_options(t, n, self.plan.options)) for t, n in self._named()), default=0)

    def _terms(self) -> int:
        """Bytes of the largest block's low-rank terms, and of a step's weights without those that come before codes."""
        shapes = [entry.weight.shape for entry in self.largest]
        options = (step_options(c, n, self.plan.options) for c, n in self._corrections())
        ranks: int = sum(each.most(rows, cols) * (rows + cols) for each in options for rows, cols in shapes)
        step = sorted(map(prod, shapes))[-3 if self.experts == 1 else 0 :]
        return 4 * (ranks + sum(step) * any(correction.before for correction in self.corrections))

    def _fitting(self) -> int:
        """Bytes while a term is fitted: the error three times, and three matrices of its smaller side in float64."""
        shapes = [entry.weight.shape for entry in self.largest if self.corrections]
        return max((12 * rows * cols + 24 * min(rows, cols) ** 2 for rows, cols in shapes), default=0)

    def _corrections(self) -> list[tuple[Correction, str]]:
        return list(zip(self.corrections, self.recipe.corrections, strict=True))

    def seconds(self, way: Cost) -> float:
        """From the multiplications of forward passes, statistics and methods, and the rates of this machine."""
        workers = 1 + _ANOTHER * (way.threads - 1)
        slow = workers * rate(torch.float32, alone=True)
        alone = self.device == "cpu"
        fast = (workers if alone else 1.0) * rate(self.blueprint.dtype, self.device, alone)
        tokens, total = prod(self.windows), _START
        for entries in self.blocks:
            weights = sum(prod(entry.weight.shape) for entry in entries)
            again = _SHORT if self._shortened and self.experts == 1 else _PASSES
            passes = again * (1 + self.paired) + self.floats + len(self.transforms)
            learned = self.method.windows(self._options(), self.windows[0])
            searched = sum(
                4 * t.tokens(step_options(t, n, self.plan.options), self.windows[1]) for t, n in self._named()
            )
            total += BESIDE * 2 * weights * (passes * tokens + learned * self.windows[1] + searched) / fast
            total += _LOOPS * sum(self._solve(entry, tokens) for entry in entries) / slow
            made = len(entries) * (2 if self.recipe.rotate else 1)  # rotated again each time that it is read
            total += _WEIGHT * made + _ELEMENT * weights / way.threads
            total += _WINDOW * learned * bool(entries)
        return total + self._outside(tokens, slow)

    def _outside(self, tokens: int, slow: float) -> float:
        """Seconds of what is outside of the blocks: slopes, forward and backward, and single weights."""
        shapes = [weight.shape for weight in self.blueprint.checkpoint.weights.values() if len(weight.shape) == 2]
        products = 3 * 2 * sum(map(prod, shapes)) * self._sloped
        loops = sum(self._solve(entry, tokens) for entry in self.outside if needs_of(entry))
        built = _SLOPE * len(self.blueprint.blocks) * self.sloped
        return built + BESIDE * products / rate(self.blueprint.dtype, self.device) + _LOOPS * loops / slow

    def _named(self) -> list[tuple[Transform, str]]:
        return list(zip(self.transforms, self.recipe.transforms, strict=True))

    def _options(self) -> object:
        return step_options(self.method, self.recipe.method, self.plan.options)

    def _solve(self, entry: Entry, tokens: int) -> float:
        """Multiplications for one weight outside of the forward passes."""
        rows, cols = entry.weight.shape[0], entry.weight.shape[-1]
        method: Method = plugins.load("methods", entry.method) if entry.method else self.method
        second = any(name in ("second_moment", "cross_moment") for name in method.needs)
        terms = len(self.corrections) * (4 * min(rows, cols) ** 3 + 2 * rows * cols**2)
        work = method.work(rows, cols, entry.weight.scheme) if entry.weight.scheme else 0.0
        return second * tokens * cols**2 / 2 + work + terms


# Passes over a block: up to each of its steps, and one for its output; where what ends in a layer is not run again.
_PASSES, _SHORT = 3.5, 1.75
BESIDE = 2.4  # attention, norms and copies beside the products of a pass: measured on models of 8M and 1.1B parameters
# Seconds that the size of the model does not change: of the run, of a weight (its part of the block that is made, found
# and compared, its file), of an element beside what the method does (rivals, codes, packing), of a window that is
# learned from; and of a block while slopes are taken, for which it is made twice more. Measured on models of 3 to 8
# blocks, dense and with 16 experts; of a long run they are a small part.
_START, _WEIGHT, _ELEMENT, _WINDOW, _SLOPE = 0.3, 0.04, 0.8e-6, 0.45e-3, 0.3
_ANOTHER = 0.7  # of the work of the first worker, what each other does in its time
_LOOPS = 2.0  # what the loops over columns fall short of plain products


@cache
def rate(dtype: torch.dtype, device: str = "cpu", alone: bool = False) -> float:
    """Multiplications and additions per second of a matrix product, measured once.

    `alone`: on one thread, as workers compute; else on all of torch's.
    """
    side = 1024
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    with one_torch_thread() if alone else nullcontext():
        best = min(_timed(left, right) for _ in range(4))
    return 2 * side**3 / best


def _timed(left: Tensor, right: Tensor) -> float:
    start = time.perf_counter()
    (left @ right)[0, 0].item()  # a device answers before it has done its work
    return time.perf_counter() - start
