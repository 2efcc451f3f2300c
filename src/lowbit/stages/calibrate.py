"""Calibrate: stream windows of tokens through the model, block by block, and quantize each block on what it sees.

One block's weights are in memory at a time. Its sub-layers are done in the order in which the block uses them, each on
the inputs that the quantized ones before it produce. What a method made is compared, on windows that it did not see,
with round-to-nearest and with `mse`; the best is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lowbit import plugins
from lowbit.budget import Estimate, MemoryWatch
from lowbit.methods import Method, Stats
from lowbit.schemes import Scheme
from lowbit.stages._blocks import Call, Entrance, LiveBlock
from lowbit.stages._model import Blueprint, open_blueprint
from lowbit.stages._products import Product, Products
from lowbit.stages._recipe import step_options
from lowbit.stages._sites import Found, Step, find_steps
from lowbit.stages._streams import Kind, Streams
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Entry, Plan
from lowbit.stages.quantize import Progress, _one_torch_thread, _tensor_stats, join, pieces_of, silent
from lowbit.stages.write import WORK, Output, Record, digest
from lowbit.stats import State, Statistic
from lowbit.tensors import QTensor

RIVALS = ("rtn", "mse")
_HELD_SHARE = 16
_ROWS = 1024
_TOKENS = 4096
_LENGTH = 2048


@final
@dataclass(frozen=True)
class Windows:
    """Calibration windows: the first `fit` are learned from, the others judge."""

    ids: Int64[Tensor, "windows tokens"]
    fit: int

    @property
    def batches(self) -> list[slice]:
        """Runs of windows that go through a block together; none holds windows of both kinds."""
        step = max(_TOKENS // self.ids.shape[1], 1)
        runs = [(0, self.fit), (self.fit, len(self.ids))]
        return [slice(at, min(at + step, stop)) for start, stop in runs for at in range(start, stop, step)]


def default_length(source: Checkpoint) -> int:
    """Tokens per window where the user names none: 2,048, or as many as the model takes."""
    config: dict[str, Any] = {**source.config, **(source.config.get("text_config") or {})}
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return min(longest, _LENGTH) if isinstance(longest, int) and longest > 0 else _LENGTH


def split_windows(ids: Int64[Tensor, "windows tokens"]) -> Windows:
    """Keep a sixteenth of the windows, at least one where there are two, for judging."""
    held = max(len(ids) // _HELD_SHARE, 1) if len(ids) > 1 else 0
    return Windows(ids, len(ids) - held)


@final
@dataclass(frozen=True)
class SiteStats:
    """What calibration saw at one site: the statistics asked for, rows to judge by, and the number of rows."""

    stats: Stats
    held: Float[Tensor, "n cols"]
    rows: int


@final
class _Accumulator:
    """Statistics of one site while rows come in."""

    def __init__(self, needs: Sequence[str], seed: int) -> None:
        self._kinds: dict[str, Statistic] = {name: plugins.load("stats", name) for name in needs}
        self._states: dict[str, State] = {}
        self._held: list[Tensor] = []
        self._seed, self.rows = seed, 0

    def fit(self, rows: Tensor, reference: Tensor | None) -> None:
        if not self._states:
            self._states = {name: kind.start(rows.shape[1], self._seed) for name, kind in self._kinds.items()}
        for name, kind in self._kinds.items():
            kind.update(self._states[name], rows, reference if kind.paired else None)
        self.rows += len(rows)

    def hold(self, rows: Tensor) -> None:
        self._held.append(rows.clone())

    def finish(self) -> SiteStats:
        stats = {name: kind.finish(self._states.pop(name)) for name, kind in self._kinds.items() if self._states}
        held = torch.cat(self._held) if self._held else torch.empty(0, 0)
        step = max(-(-len(held) // _ROWS), 1)
        return SiteStats(stats, held[::step].float(), self.rows)


@final
@dataclass(frozen=True)
class Calibration:
    """Everything that stays the same from block to block."""

    source: Checkpoint
    plan: Plan
    output: Output
    way: Estimate
    blueprint: Blueprint
    windows: Windows
    streams: Streams
    entrance: Entrance

    def entries(self, path: str) -> list[Entry]:
        """The entries of one block, in the order of the plan."""
        inside = self.blueprint.blocks[path]
        return [entry for entry in self.plan.entries if entry.weight.name in inside]

    def call(self, path: str, windows: int) -> Call:
        """How the model calls a block with so many windows."""
        return self.entrance.calls(self.windows.ids[:windows])[path]


def calibrate(
    source: Checkpoint,
    plan: Plan,
    output: Output,
    way: Estimate,
    ids: Int64[Tensor, "windows tokens"],
    watch: MemoryWatch,
    progress: Progress = silent,
) -> None:
    """Quantize every block of the model that `output` does not have yet.

    Raises:
        WeightError: NaN or Inf in a weight, naming tensor and index.
        CheckpointError: the model cannot be run.
        ResourceError: the disk is full, or the memory limit was passed.
    """
    blueprint = open_blueprint(source, torch.bfloat16)
    paths = list(blueprint.blocks)
    names = [{entry.weight.name for entry in plan.entries} & blueprint.blocks[path] for path in paths]
    done = next((k for k, inside in enumerate(names) if not inside <= output.records.keys()), len(paths))
    if done == len(paths):
        return
    with torch.no_grad():
        entrance = Entrance(blueprint)
        width = entrance.hidden(ids[:1]).shape[-1]
        streams = Streams(output.path / WORK / "hidden", (*ids.shape, width), blueprint.dtype, _kinds(plan))
        work = Calibration(source, plan, output, way, blueprint, split_windows(ids), streams, entrance)
        start = streams.latest(done)
        if start == 0:
            _enter(work)
        for k in range(start, len(paths)):
            progress("calibrate", k, len(paths))
            watch.check()
            _BlockRun(work, paths[k], k).run()
            streams.forget(k + 1)
        progress("calibrate", len(paths), len(paths))


def _kinds(plan: Plan) -> tuple[Kind, ...]:
    """The float stream is kept where a method compares with it."""
    methods: list[Method] = [plugins.load("methods", name) for name in {e.method for e in plan.entries} if name]
    paired = any(plugins.load("stats", name).paired for method in methods for name in method.needs)
    learns = any(method.learn for method in methods)
    return ("quantized", "float") if paired or learns else ("quantized",)


def _enter(work: Calibration) -> None:
    """Write the first block's inputs."""
    for kind in work.streams.kinds:
        with work.streams.writing(kind, 0) as hidden:
            for batch in work.windows.batches:
                hidden[batch] = work.entrance.hidden(work.windows.ids[batch])


@final
class _BlockRun:
    """The work on one block."""

    def __init__(self, work: Calibration, path: str, index: int) -> None:
        self.work, self.path, self.index = work, path, index
        self.entries = {entry.weight.name: entry for entry in work.entries(path)}
        matrices = [name for name, entry in self.entries.items() if len(entry.weight.shape) == 2]
        self.live = LiveBlock(work.blueprint, path, matrices)
        self.inputs = work.streams.read("quantized", index)

    def run(self) -> None:
        """All of it; weights are committed one by one, the block's outputs at the end."""
        if "float" in self.work.streams.kinds:
            self._forward("float", self.work.streams.read("float", self.index))
        targets = [name for name, entry in self.entries.items() if entry.weight.scheme]
        steps = find_steps(self.live, targets, lambda: self._batch(slice(0, 1)))
        for at, step in enumerate(steps):
            later = frozenset(name for other in steps[at + 1 :] for name in other.names)
            self._quantize(step, self._observe(step, later))
        for name, entry in self.entries.items():
            if entry.weight.scheme is None:
                self._keep(entry)
        self._forward("quantized", self.inputs)

    def _batch(self, batch: slice, inputs: Tensor | None = None) -> Tensor:
        hidden = (self.inputs if inputs is None else inputs)[batch]
        return self.live.run(self.work.call(self.path, len(hidden)), hidden)

    def _forward(self, kind: Kind, inputs: Tensor) -> None:
        with self.work.streams.writing(kind, self.index + 1) as outputs:
            for batch in self.work.windows.batches:
                outputs[batch] = self._batch(batch, inputs)

    def _observe(self, step: Step, later: frozenset[str]) -> dict[tuple[str, ...], SiteStats]:
        """Statistics of each site of a step."""
        found = {site: _Accumulator(self._needs(site), self.index) for site in step.sites}
        site_of = {name: site for site in step.sites for name in site}
        regions = {name: self.live.region(name) for name in (*step.names, *later)}
        for batch in self.work.windows.batches:
            take = _Accumulator.fit if batch.start < self.work.windows.fit else _Accumulator.hold
            done: set[tuple[str, ...]] = set()

            def see(product: Product, take: Any = take, done: set[tuple[str, ...]] = done) -> None:
                if product.names[0] in later:
                    raise Found
                site = site_of[product.names[0]]
                if site not in done:
                    done.add(site)
                    rows = (product.rows, None) if take is _Accumulator.fit else (product.rows,)
                    take(found[site], *rows)

            with suppress(Found), Products(regions, see):
                self._batch(batch)
        return {site: each.finish() for site, each in found.items()}

    def _needs(self, site: tuple[str, ...]) -> list[str]:
        methods: list[Method] = [plugins.load("methods", self.entries[name].method or "rtn") for name in site]
        return sorted({need for method in methods for need in method.needs})

    def _quantize(self, step: Step, seen: Mapping[tuple[str, ...], SiteStats]) -> None:
        """Quantize the weights of a step, put them into the block, and store them."""
        jobs = [self._job(name, seen[site]) for site in step.sites for name in site]
        with _one_torch_thread(), ThreadPoolExecutor(self.work.way.threads, "calibrate") as pool:
            pieces = [(job, pool.submit(job.piece, *at)) for job in jobs for at in job.places()]
            for job in jobs:
                made = job.choose([future.result() for owner, future in pieces if owner is job])
                self.live.weight(job.entry.weight.name).copy_(made.qtensor.dequantize())
                self._commit(job.entry, made)

    def _job(self, name: str, seen: SiteStats) -> _Job:
        entry, weight = self.entries[name], self.live.weight(name).float()
        assert entry.weight.scheme is not None and entry.method is not None
        method: Method = plugins.load("methods", entry.method)
        options = step_options(method, entry.method, self.work.plan.options)
        stats = {**method.prepare(seen.stats, entry.weight.scheme, options)}
        stats |= _tensor_stats(weight, entry.weight.scheme, self.work.way.piece)
        return _Job(entry, weight, stats, seen.held, options, self.work.way.piece)

    def _commit(self, entry: Entry, made: _Made) -> None:
        output, plan = self.work.output, self.work.plan
        source = digest(self.work.source.tensor(entry.weight.name).contiguous())
        if entry.weight.name in output.records:
            return
        parts = output.into(entry, mapped=False)
        plan.rules.pack(entry.weight, made.qtensor, parts)
        output.store(parts)
        meant = {name: digest(part.contiguous()) for name, part in made.qtensor.parts()}
        stored = {name: digest(part) for name, part in parts.items()}
        output.commit(Record(entry.weight.name, source, meant, stored, made.facts))

    def _keep(self, entry: Entry) -> None:
        output, name = self.work.output, entry.weight.name
        if entry.tied or name in output.records:
            return
        tensor = self.work.source.tensor(name).contiguous()
        output.store({name: tensor})
        found = digest(tensor)
        output.commit(Record(name, found, {"weight": found}, {name: found}, {"method": None, "seconds": 0.0}))


@final
@dataclass(frozen=True)
class _Piece:
    """Candidates for a run of rows: each method's result, and its squared output error."""

    rows: slice
    made: Mapping[str, QTensor]
    errors: Mapping[str, float]
    power: float
    seconds: float


@final
@dataclass(frozen=True)
class _Made:
    """The result for one weight, and what the report says of it."""

    qtensor: QTensor
    facts: Mapping[str, Any]


@final
@dataclass(frozen=True, eq=False)
class _Job:
    """One weight to quantize, in pieces of rows."""

    entry: Entry
    weight: Float[Tensor, "rows cols"]
    stats: Stats
    held: Float[Tensor, "n cols"]
    options: Any
    elements: int

    @property
    def scheme(self) -> Scheme:
        """Of the weight."""
        assert self.entry.weight.scheme is not None
        return self.entry.weight.scheme

    @cached_property
    def methods(self) -> dict[str, tuple[Method, Any]]:
        """The method of the plan, and those it is compared with."""
        assert self.entry.method is not None
        found: dict[str, tuple[Method, Any]] = {
            self.entry.method: (plugins.load("methods", self.entry.method), self.options)
        }
        for name in RIVALS if self.held.numel() else ():
            method: Method = plugins.load("methods", name)
            if name not in found and method.supports(self.scheme) is None:
                found[name] = (method, method.options())
        return found

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each piece."""
        return pieces_of(tuple(self.weight.shape), self.scheme.block, self.elements)

    def piece(self, rows: slice, cols: slice) -> _Piece:
        """All candidates for some rows."""
        start, part = time.perf_counter(), self.weight[rows, cols]
        made = {
            name: method.quantize(part, self.stats, self.scheme, options)
            for name, (method, options) in self.methods.items()
        }
        errors = {name: self._output_power(q.dequantize() - part) for name, q in made.items()}
        return _Piece(rows, made, errors, self._output_power(part), time.perf_counter() - start)

    def _output_power(self, part: Float[Tensor, "some cols"]) -> float:
        return float((self.held @ part.T).square().sum(dtype=torch.float64)) if self.held.numel() else 0.0

    def choose(self, pieces: Sequence[_Piece]) -> _Made:
        """The candidate with the least output error on held-out rows; the plan's method among equals."""
        planned = next(iter(self.methods))
        errors = {name: sum(piece.errors[name] for piece in pieces) for name in self.methods}
        best = min(errors, key=lambda name: (errors[name], name != planned))
        parts = [piece.made[best] for piece in pieces]
        codes = torch.cat([part.codes for part in parts])
        qtensor = join(self.entry.weight, codes, [(part.scales, part.zeros) for part in parts])
        power = sum(piece.power for piece in pieces)
        gap = qtensor.dequantize() - self.weight
        facts = {
            "method": best,
            "relative_error": float(
                gap.square().sum(dtype=torch.float64) / self.weight.square().sum(dtype=torch.float64)
            ),
            "largest_error": float(gap.abs().max()),
            "output_error": errors[best] / power if power else None,
            "against_rtn": errors[best] / errors["rtn"] if errors.get("rtn") else None,
            "seconds": sum(piece.seconds for piece in pieces),
        }
        return _Made(qtensor, facts)
