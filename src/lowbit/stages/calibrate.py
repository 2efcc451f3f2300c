"""Calibrate: stream windows of tokens through the model, block by block, and quantize each block on what it sees.

One block's weights are in memory at a time. Its sub-layers are done in the order in which the block uses them, each on
the inputs that the quantized ones before it produce. What a method made is compared, on windows that it did not see,
with round-to-nearest and with `mse`; the best is kept.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from jaxtyping import Int64
from torch import Tensor

from lowbit import plugins
from lowbit.blocks import Block
from lowbit.blocks import Site as BlockSite
from lowbit.budget import MemoryWatch
from lowbit.corrections import Correction, Term
from lowbit.corrections import Options as TermOptions
from lowbit.corrections._lowrank import ranks
from lowbit.errors import UnsupportedError
from lowbit.methods import Method, Stats
from lowbit.stages._activations import input_scale, rounded
from lowbit.stages._adapter import Terms
from lowbit.stages._attention import Memory, Remembered, exact_products
from lowbit.stages._blocks import Call, Entrance, LiveBlock
from lowbit.stages._cost import Cost, estimate
from lowbit.stages._fold import Producer, effective, find_producer
from lowbit.stages._jobs import Job
from lowbit.stages._model import Blueprint, open_blueprint
from lowbit.stages._observe import Accumulator, Observer, Seen, Watch, Windows, split_windows
from lowbit.stages._pages import kept_pages
from lowbit.stages._products import Product
from lowbit.stages._recipe import Recipe, parse_recipe, step_options
from lowbit.stages._sites import Found, Site, Step, find_steps
from lowbit.stages._store import Value, store
from lowbit.stages._streams import Kind, Streams
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import OUTSIDE, Entry, Plan
from lowbit.stages.quantize import Progress, measure, one_torch_thread, silent, tensor_stats
from lowbit.stages.write import WORK, Output
from lowbit.tensors import QTensor
from lowbit.transforms import Transform

T = TypeVar("T")
After = Callable[[Product, Tensor], Tensor]
_LENGTH = 2048
_ABSMAX = "absmax"
_AT_ONCE = 32  # windows that are embedded together
_CERTAIN = 30.0  # logits: a router that sees it chooses that expert
_ENOUGH = 4  # rows per input for an expert that got all tokens


def default_length(source: Checkpoint) -> int:
    """Tokens per window where the user names none: 2,048, or as many as the model takes."""
    config: dict[str, Any] = {**source.config, **(source.config.get("text_config") or {})}
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return min(longest, _LENGTH) if isinstance(longest, int) and longest > 0 else _LENGTH


@final
@dataclass(frozen=True, eq=False)
class Prepared:
    """A calibrated run that was looked at and not begun: made by `prepare`."""

    source: Checkpoint
    plan: Plan
    blueprint: Blueprint
    ids: Int64[Tensor, "windows tokens"]
    cost: Cost


def prepare(
    source: Checkpoint, plan: Plan, ids: Int64[Tensor, "windows tokens"], ram: int | None, threads: int
) -> Prepared:
    """Open the model and estimate what calibrating it takes.

    Raises:
        CheckpointError: the checkpoint is no causal language model.
        ResourceError: the limit is too small, with the least that works.
    """
    blueprint = open_blueprint(source, compute_dtype(plan))
    if not blueprint.blocks:
        raise UnsupportedError(f"{source.path} has no list of blocks to calibrate; use a method without calibration")
    cost = estimate(plan, parse_recipe(plan.recipe), blueprint, (ids.shape[0], ids.shape[1]), ram, threads)
    return Prepared(source, plan, blueprint, ids, cost)


@final
@dataclass(frozen=True)
class Calibration:
    """Everything that stays the same from block to block."""

    source: Checkpoint
    plan: Plan
    recipe: Recipe
    output: Output
    way: Cost
    blueprint: Blueprint
    windows: Windows
    streams: Streams
    entrance: Entrance
    terms: Terms

    def call(self, path: str, windows: int) -> Call:
        """How the model calls a block with so many windows."""
        return self.entrance.calls(self.windows.ids[:windows])[path]


def calibrate(prepared: Prepared, output: Output, watch: MemoryWatch, progress: Progress = silent) -> None:
    """Quantize every block of the model that `output` does not have yet.

    Raises:
        WeightError: NaN or Inf in a weight, naming tensor and index.
        CheckpointError: the model cannot be run.
        UnsupportedError: its blocks cannot be run on their own.
        ResourceError: the disk is full, or the memory limit was passed.
    """
    plan, blueprint = prepared.plan, prepared.blueprint
    stored = {entry.weight.name for entry in plan.entries if not entry.tied}
    wanted = {path: stored & inside for path, inside in blueprint.blocks.items()}
    paths = _worked_on(plan, wanted)
    done = next((k for k, path in enumerate(paths) if not wanted[path] <= output.records.keys()), len(paths))
    if done == len(paths):
        return
    with torch.no_grad():
        work = _begin(prepared, output)
        start = work.streams.latest(done)
        if start == 0:
            _enter(work)
        for k in range(start, len(paths)):
            progress("calibrate", k, len(paths))
            watch.check()
            _BlockRun(work, paths[k], k).run()
            work.streams.forget(k + 1)
        progress("calibrate", len(paths), len(paths))


def _worked_on(plan: Plan, wanted: Mapping[str, AbstractSet[str]]) -> list[str]:
    """The blocks up to the last one that has something to quantize."""
    quantized = {entry.weight.name for entry in plan.entries if entry.weight.scheme}
    paths = list(wanted)
    last = max((k for k, path in enumerate(paths) if wanted[path] & quantized), default=-1)
    return paths[: last + 1]


def compute_dtype(plan: Plan) -> torch.dtype:
    """The type in which calibration computes."""
    assert plan.calibration is not None
    if plan.calibration.dtype != "auto":
        found: torch.dtype = getattr(torch, plan.calibration.dtype)
        return found
    sources = {entry.weight.dtype for entry in plan.entries if entry.weight.scheme}
    return torch.bfloat16 if sources == {torch.bfloat16} and computes_bfloat16() else torch.float32


def computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices by itself."""
    info = Path("/proc/cpuinfo")
    return info.exists() and re.search(r"\b(avx512_bf16|amx_bf16)\b", info.read_text()) is not None


def _begin(prepared: Prepared, output: Output) -> Calibration:
    blueprint, ids, cost = prepared.blueprint, prepared.ids, prepared.cost
    recipe, shape = parse_recipe(prepared.plan.recipe), (ids.shape[0], ids.shape[1], blueprint.width)
    return Calibration(
        prepared.source,
        prepared.plan,
        recipe,
        output,
        cost,
        blueprint,
        split_windows(ids, cost.tokens),
        Streams(output.path / WORK / "hidden", shape, blueprint.dtype, _kinds(recipe)),
        Entrance(blueprint),
        Terms(output.path),
    )


def _kinds(recipe: Recipe) -> tuple[Kind, ...]:
    """The float stream is kept where something compares with it."""
    return ("quantized", "float") if recipe.paired or recipe.learns or recipe.transforms else ("quantized",)


def _enter(work: Calibration) -> None:
    """Write the first block's inputs."""
    for kind in work.streams.kinds:
        with work.streams.writing(kind, 0) as hidden:
            for ids, rows in zip(torch.split(work.windows.ids, _AT_ONCE), torch.split(hidden, _AT_ONCE), strict=True):
                rows.copy_(work.entrance.hidden(ids))


@final
class _BlockRun:
    """The work on one block: transform, learn or quantize step by step, store, and pass on what it computes."""

    def __init__(self, work: Calibration, path: str, index: int) -> None:
        self.work, self.path, self.index = work, path, index
        inside = work.blueprint.blocks[path]
        self.entries = {e.weight.name: e for e in work.plan.entries if e.weight.name in inside and not e.tied}
        matrices = [name for name, entry in self.entries.items() if len(entry.weight.shape) == 2]
        self.live = LiveBlock(work.blueprint, path, matrices)
        self.inputs = work.streams.read("quantized", index)
        self.memory = Memory(work.output.path / WORK / "hidden" / "attention")
        self.floats: dict[str, Tensor] = {}  # weights that a transform changed, float32
        self.made: set[str] = set()
        self.scales: dict[str, float | None] = {}  # of activations, where they are stored
        self.terms: dict[str, dict[str, Term]] = {}  # beside weights, by step of the recipe
        self.open: dict[str, Term] = {}  # those whose ranks the block's budget will choose

    def run(self) -> None:
        """All of it; weights are committed one by one, the block's outputs at the end."""
        if "float" in self.work.streams.kinds:
            self._forward("float", self.work.streams.read("float", self.index))
        steps = find_steps(self.live, lambda watch: self._batch(slice(0, 1), watch=watch))
        if self._sees_float():
            steps = [Step(tuple(site for step in steps for site in step.sites), False)]
        for name in self.work.recipe.transforms:
            self._transform(name, steps)
        reference = self._reference()
        if self._method().learn:
            self._learn(steps)
            self._mend(steps)
        for at, step in enumerate(steps):
            # Experts run one after the other: the next ones are not past when the second layer of the first is reached.
            past = [other for other in steps[at + 1 :] if not (step.experts and other.experts)]
            later = frozenset(name for other in past for name in other.names)
            sites = [site for site in step.sites if self._targets(site)]
            self._quantize(self._observe(step, sites, later, reference))
        self._unreached()
        self._spend()
        self._keep()
        self._forward("quantized", self.inputs)
        self.memory.forget()

    def _sees_float(self) -> bool:
        """Whether all statistics are of the float block, taken in one pass."""
        calibration = self.work.plan.calibration
        return calibration is not None and calibration.inputs == "float"

    def _method(self) -> Method:
        method: Method = plugins.load("methods", self.work.recipe.method)
        return method

    def _targets(self, names: Sequence[str]) -> list[str]:
        """Those of the weights that are quantized and not done yet."""
        return [name for name in names if self.entries[name].weight.scheme and name not in self.made]

    def _weight(self, name: str) -> Tensor:
        """The same in float32."""
        return self._kept(name).float().contiguous()

    def _width(self, site: Site) -> int:
        """Number of inputs of a site."""
        return self.live.weight(site[0]).shape[1]

    def _batch(
        self,
        batch: slice | Sequence[int],
        inputs: Tensor | None = None,
        weights: Mapping[str, Tensor] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
        after: After | None = None,
    ) -> Tensor:
        """The block's output for some windows."""
        hidden = (self.inputs if inputs is None else inputs)[batch]
        call = self.work.call(self.path, len(hidden))
        return self.live.run(call, hidden, weights, parameters, watch or self._rounding(), self._beside(after))

    def _beside(self, after: After | None) -> After | None:
        """Adds to each product what the low-rank terms make of its rows, which are not rounded, then calls `after`."""
        if not self.terms:
            return after

        def add(product: Product, result: Tensor) -> Tensor:
            heights = [len(self.live.weight(name)) for name in product.names]
            for name, part in zip(product.names, torch.split(result, heights, -1), strict=True):
                for term in self.terms.get(name, {}).values():
                    thin = product.rows @ term.down.T.to(result.dtype)
                    part.add_((thin @ term.up.T.to(result.dtype)).view(part.shape))
            return after(product, result) if after else result

        return add

    def _rounding(self, factors: Mapping[str, Tensor] | None = None) -> Watch | None:
        """A watch that rounds activations, of the weights that are on their grid by now; None where none is rounded."""
        rounds = {n: e.weight.activations for n, e in self.entries.items() if e.weight.activations}
        if not rounds:
            return None

        def watch(product: Product) -> Tensor | None:
            scheme, name = rounds.get(product.names[0]), product.names[0]
            if scheme is None or (factors is None and name not in self.made):
                return None
            return rounded(product.rows, scheme, self.scales.get(name), (factors or {}).get(name))

        return watch

    def _forward(self, kind: Kind, inputs: Tensor) -> None:
        def pass_on(batch: slice) -> None:
            with Remembered(self.memory, f"{kind}-{batch.start}", lambda: False):
                outputs[batch] = self._batch(batch, inputs)

        with self.work.streams.writing(kind, self.index + 1) as outputs:
            self._in_turn(pass_on, self.work.windows.batches)

    def _in_turn(
        self, work: Callable[[slice], T], batches: Sequence[slice], take: Callable[[slice, T], None] | None = None
    ) -> None:
        """Work on each batch by all workers, each on its own batch; then `take` what was found, in order.

        Small products gain nothing from threads of their own, and waking these costs more than the products.
        """
        for size in {batch.stop - batch.start for batch in batches}:
            self.work.call(self.path, size)  # recorded before: a recording is a pass of its own

        def quietly(batch: slice, before: Future[None] | None) -> None:
            with torch.no_grad():
                found = work(batch)
                if take:
                    wait([before] if before else [])  # a worker that had it began it before
                    take(batch, found)

        exact, threads = exact_products(self.work.blueprint.dtype), self.work.way.threads
        with exact, one_torch_thread(), ThreadPoolExecutor(threads, "calibrate") as pool:
            futures: list[Future[None]] = []
            for batch in batches:
                futures.append(pool.submit(quietly, batch, futures[-1] if futures else None))
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _reference(self) -> LiveBlock | None:
        """The float block beside the one that is being quantized, where a statistic compares the two."""
        if not self.work.recipe.paired:
            return None
        twin = LiveBlock(self.work.blueprint, self.path, list(self.live.places))
        twin.places = self.live.places
        for name, _ in twin.module.named_parameters():
            twin.tensor(name).copy_(self.live.tensor(name))
        return twin

    def _observe(
        self,
        step: Step,
        sites: Sequence[Site],
        later: frozenset[str] = frozenset(),
        reference: LiveBlock | None = None,
    ) -> dict[Site, Seen]:
        """Statistics of some sites of a step, of as many at once as memory allows."""
        seen: dict[Site, Seen] = {}
        for group in _groups(sites, self.work.way.sites):
            seen |= self._gather({site: self._needs(site) for site in group}, None, later, reference)
        return {**seen, **self._all_tokens(step, seen, later)} if step.experts else seen

    def _gather(
        self,
        needs: Mapping[Site, Iterable[str]],
        batches: Sequence[slice] | None = None,
        later: frozenset[str] = frozenset(),
        reference: LiveBlock | None = None,
    ) -> dict[Site, Seen]:
        """The statistics that each site needs, in one pass over all batches, or some."""
        found = {site: self._accumulator(names) for site, names in needs.items()}
        self._look(self.work.windows.batches if batches is None else batches, found, later, reference)
        return {site: each.finish() for site, each in found.items()}

    def _accumulator(self, needs: Iterable[str]) -> Accumulator:
        windows = self.work.windows
        return Accumulator(sorted(needs), self.index, len(windows.held) * windows.ids.shape[1])

    def _look(
        self,
        batches: Sequence[slice],
        sites: Mapping[Site, Accumulator],
        later: frozenset[str],
        reference: LiveBlock | None = None,
        after: After | None = None,
    ) -> None:
        """Run batches of windows, as far as needed, and give what the sites read to their accumulators."""

        def rows_of(batch: slice) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
            own, other = Observer(sites, later), Observer(sites, later)
            if reference:
                hidden = self.work.streams.read("float", self.index)[batch]
                with suppress(Found), Remembered(self.memory, f"float-{batch.start}", lambda: True):
                    reference.run(self.work.call(self.path, len(hidden)), hidden, watch=other)
            rounding = self._rounding()

            def both(product: Product) -> Tensor | None:
                own(product)
                return rounding(product) if rounding else None

            known = f"quantized-{batch.start}" + ("" if after is None else "-routed")
            with suppress(Found), Remembered(self.memory, known, lambda: own.before and after is None):
                self._batch(batch, watch=both, after=after)
            return own.rows, other.rows

        def take(batch: slice, found: tuple[dict[Site, Tensor], dict[Site, Tensor]]) -> None:
            rows, references = found
            for site in rows:
                sites[site].take(rows[site], references.get(site), batch.start >= self.work.windows.fit)

        self._in_turn(rows_of, batches, take)

    def _all_tokens(self, step: Step, seen: Mapping[Site, Seen], later: frozenset[str]) -> dict[Site, Seen]:
        """Experts that saw fewer rows than they have inputs: routed to them, one at a time, until they have enough."""
        few = [site for site in seen if seen[site].rows < self._width(site)]
        router = next((name for name in self.live.places if self._routes(name, step)), None)
        found: dict[Site, Seen] = {}
        for site in few if router else ():
            accumulator, expert = self._accumulator(self._needs(site)), step.sites.index(site)

            def choose(product: Product, result: Tensor, expert: int = expert) -> Tensor:
                if product.names[0] == router:
                    result = result.clone()
                    result[..., expert] = result.amax(-1) + _CERTAIN
                return result

            for batch in self.work.windows.batches:
                if accumulator.rows < _ENOUGH * self._width(site) or batch.start >= self.work.windows.fit:
                    self._look([batch], {site: accumulator}, later, after=choose)
            found[site] = replace(accumulator.finish(), starved=seen[site].rows)
        return found

    def _routes(self, name: str, step: Step) -> bool:
        """Whether a weight has a row for each expert of a step."""
        return name not in step.names and self.live.weight(name).shape[0] == len(step.sites)

    def _needs(self, site: Site) -> set[str]:
        weights = [self.entries[name] for name in self._targets(site)]
        methods: list[Method] = [plugins.load("methods", entry.method) for entry in weights if entry.method]
        needs = {need for method in methods for need in method.needs}
        needs |= {need for name in self.work.recipe.corrections for need in plugins.load("corrections", name).needs}
        return needs | ({_ABSMAX} if self._rounds(site) else set())

    def _quantize(self, seen: Mapping[Site, Seen]) -> None:
        """Quantize the weights of a step, put them into the block, and store them."""
        jobs: list[Job] = []
        for site, found in seen.items():
            prepared: dict[Any, Stats] = {}
            jobs += [self._job(name, found, prepared) for name in self._targets(site)]
        self._carry_out(jobs)

    def _carry_out(self, jobs: Sequence[Job]) -> None:
        with one_torch_thread(), ThreadPoolExecutor(self.work.way.threads, "calibrate") as pool:
            work = [[pool.submit(job.piece, rows) for rows in job.places()] for job in jobs]
            for job, futures in zip(jobs, work, strict=True):
                pieces = [future.result() for future in futures]
                futures.clear()
                best, made = job.choose(pieces)
                for piece in pieces if job.entry.weight.name in self.live.places else ():
                    rows = self.live.weight(job.entry.weight.name)[piece.rows]
                    rows.copy_(piece.made[best].dequantize().view_as(rows))
                self._settle(job.entry, made.qtensor, made.facts)
        for job in jobs:
            self._correct(job.entry.weight.name, job.seen)

    def _corrections(self, name: str, seen: Seen, before: bool) -> Iterator[tuple[str, Correction, TermOptions]]:
        """The corrections of the recipe that a weight gets before its codes are made, or after, with their options."""
        for step in self.work.recipe.corrections:
            correction: Correction = plugins.load("corrections", step)
            reached = name in self.live.places and seen.rows and correction.needs <= seen.stats.keys()
            if reached and correction.before == before:
                yield step, correction, step_options(correction, step, self.work.plan.options)

    def _put(self, name: str, step: str, term: Term) -> None:
        """Place a term beside its weight, for good."""
        self.terms.setdefault(name, {})[step] = term
        if len(term.gains):
            self.work.terms.add(name, step, term.down, term.up)

    def _correct(self, name: str, seen: Seen) -> None:
        """Fit the low-rank terms to what is left of a weight, one after the other."""
        for step, correction, options in self._corrections(name, seen, before=False):
            left = self._weight(name) - self.live.weight(name).float()
            for term in self.terms.get(name, {}).values():
                left.addmm_(term.up, term.down, alpha=-1)
            term = correction.fit(left, seen.stats, options)
            if options.budget is None:
                self._put(name, step, term)
            else:  # the steps that follow see it with the rank that it has where all have the same
                self.open[name] = term
                self.terms.setdefault(name, {})[step] = term.first(options.even(*left.shape))

    def _mend(self, steps: Sequence[Step]) -> None:
        """Terms for weights that were learned together: step by step, each on what the terms before it mended."""
        for step in steps if self.work.recipe.corrections else ():
            sites = [site for site in step.sites if self.made.intersection(site)]
            for site, seen in self._observe(step, sites).items():
                for name in (name for name in site if name in self.made):
                    self._correct(name, seen)

    def _spend(self) -> None:
        """Distribute the block's share of the budget over the terms that were left open."""
        if not self.open:
            return
        step = self.work.recipe.corrections[-1]
        budget = step_options(plugins.load("corrections", step), step, self.work.plan.options).budget
        weights = sum(len(term.up) * term.down.shape[1] for term in self.open.values())
        for name, rank in ranks(self.open, int(budget * weights / 8)).items():
            self._put(name, step, self.open[name].first(rank))
        self.memory.forget()  # attention was of the ranks before

    def _job(self, name: str, seen: Seen, prepared: dict[Any, Stats]) -> Job:
        """The work on one weight; what a method prepares is shared by weights of one scheme at one site."""
        entry, piece = self.entries[name], self.work.way.piece
        scheme = entry.weight.scheme
        assert scheme is not None and entry.method is not None
        method: Method = plugins.load("methods", entry.method)
        reached = method.needs <= seen.stats.keys() and not method.learn
        chosen = entry.method if reached else OUTSIDE
        method = plugins.load("methods", chosen)
        options = step_options(method, chosen, self.work.plan.options)
        if (chosen, scheme) not in prepared:
            prepared[chosen, scheme] = method.prepare(seen.stats, scheme, options)
        self._scale_input(name, seen)
        whole = self._kept(name)
        weight = self._residual(name, whole, seen)
        stats = {**prepared[chosen, scheme], **tensor_stats(weight, scheme, piece)}
        return Job(entry, chosen, weight, stats, seen, options, piece, whole)

    def _scale_input(self, name: str, seen: Seen) -> None:
        """The scale by which a weight's inputs are rounded, where it is stored."""
        scheme = self.entries[name].weight.activations
        if scheme and _ABSMAX in seen.stats:
            self.scales[name] = input_scale(float(seen.stats[_ABSMAX].max()), scheme)

    def _residual(self, name: str, whole: Tensor, seen: Seen) -> Tensor:
        """What is left of a weight when the terms that come before its codes are taken out of it."""
        for step, correction, options in self._corrections(name, seen, before=True):
            left = whole.float()
            term = correction.fit(left, seen.stats, options)
            self._put(name, step, term)
            whole = torch.addmm(left, term.up, term.down, alpha=-1)
        return whole

    def _kept(self, name: str) -> Tensor:
        """A weight as the transforms left it, in the type in which it is kept, `[outputs, inputs]`."""
        if name in self.floats:
            return self.floats[name]
        tensor, place = self.work.source.tensor(name), self.live.places.get(name)
        turned = place is not None and place.swapped and not self.entries[name].weight.swapped
        return tensor.T.contiguous() if turned else tensor

    def _settle(self, entry: Entry, value: Value, facts: Mapping[str, Any]) -> None:
        """Store a result, unless it is there from an earlier run; read back in mapped files, which cost no memory."""
        name, output = entry.weight.name, self.work.output
        self.made.add(name)
        if name not in output.records:
            entry = replace(entry, weight=replace(entry.weight, input_scale=self.scales.get(name)))
            facts = {**facts, "folded": name in self.floats}
            store(output, entry, value, self.work.source.tensor(name), facts, scratch=True)

    def _unreached(self) -> None:
        """Quantize, without statistics, weights that no product of the block was seen to read."""
        nothing = Seen({}, torch.empty(0, 0), 0)
        self._carry_out([self._job(name, nothing, {}) for name in self._targets(list(self.entries))])

    def _keep(self) -> None:
        """Store what is not quantized, changed by a transform or not."""
        for name, entry in self.entries.items():
            if not entry.weight.scheme:
                value = self.floats.get(name, self.work.source.tensor(name))
                facts = {"method": None, "seconds": 0.0}
                self._settle(entry, value.to(entry.weight.dtype).contiguous(), facts)

    # Transforms.

    def _transform(self, name: str, steps: Sequence[Step]) -> None:
        """Let a transform choose factors for each site in the order of use, and fold them."""
        transform: Transform = plugins.load("transforms", name)
        options = step_options(transform, name, self.work.plan.options)
        needs = {site: transform.needs for step in steps for site in step.sites if self._targets(site)}
        fit = [batch for batch in self.work.windows.batches if batch.start < self.work.windows.fit]
        for site, seen in self._gather(needs, fit).items():
            producer = self._producer(site) if seen.stats else None
            if producer:
                block = self._block(steps)
                where = BlockSite(tuple(self._targets(site)), self._width(site))
                factors = transform.search(where, block, seen.stats, options)
                if factors is not None:
                    self._fold(site, producer, factors)

    def _producer(self, site: Site) -> Producer | None:
        hidden = self.inputs[:1]

        def added(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
            return self._batch(slice(0, 1), weights=weights, parameters=parameters) - hidden

        found = find_producer(self.live, site, added)
        return found if found and all(self._owner(name) for name in found.parameters) else None

    def _owner(self, parameter: str) -> str | None:
        """The weight of the checkpoint that is this parameter; None where it is made of several."""
        sources = self.work.blueprint.sources(self.path)[parameter]
        return next(iter(sources)) if len(sources) == 1 else None

    def _fold(self, site: Site, producer: Producer, factors: Tensor) -> None:
        """Divide what makes the input, multiply what reads it; readers take the factors as they were rounded."""
        exact = factors
        for parameter in producer.parameters:
            owner, value = self._owner(parameter), self.live.tensor(parameter)
            assert owner is not None
            quantized = bool(self.entries[owner].weight.scheme)
            whole = self._weight(owner)
            new = producer.divided(whole, factors, torch.float32 if quantized else self.entries[owner].weight.dtype)
            if value.dim() == 1 and parameter == producer.parameters[0]:
                exact = effective(producer, whole, new, factors)
            self.floats[owner] = new.float()
            value.copy_(new)
        for name in site:
            self.floats[name] = self._weight(name) * exact
            self.live.weight(name).copy_(self.floats[name])

    # Methods that learn.

    def _block(self, steps: Sequence[Step]) -> Block:
        """The block as methods and transforms see it."""
        names = [name for step in steps for name in self._targets(step.names)]
        schemes = {name: self.entries[name].weight.scheme for name in names}
        activations = {n: self.entries[n].weight.activations for n in names}
        targets = self.work.streams.read("float", self.index + 1)

        def run(
            indices: Sequence[int], weights: Mapping[str, Tensor], factors: Mapping[str, Tensor] | None = None
        ) -> Tensor:
            watch = self._rounding(factors or {}) if any(activations.values()) else None
            return self._batch(list(indices), weights=weights, watch=watch)

        return Block(
            weights={name: self._weight(name) for name in names},
            schemes={name: scheme for name, scheme in schemes.items() if scheme},
            windows=self.work.windows.fit,
            run=run,
            target=lambda indices: targets[list(indices)],
            nearest=lambda name, weight: self._nearest(name, weight).dequantize(),
            activations={name: scheme for name, scheme in activations.items() if scheme},
            seed=self.index,
            threads=self.work.way.threads,
        )

    def _nearest(self, name: str, weight: Tensor) -> QTensor:
        """Round-to-nearest under the plan's scheme."""
        scheme = self.entries[name].weight.scheme
        assert scheme is not None
        rtn: Method = plugins.load("methods", "rtn")
        return rtn.quantize(weight, tensor_stats(weight, scheme, self.work.way.piece), scheme, rtn.options())

    def _learn(self, steps: Sequence[Step]) -> None:
        """Learn all weights of the block together; kept where that beats round-to-nearest on held-out windows."""
        method, start = self._method(), time.perf_counter()
        assert method.learn is not None
        self._scale_inputs(steps)
        block = self._block(steps)
        options = step_options(method, self.work.recipe.method, self.work.plan.options)
        with one_torch_thread(), kept_pages(), torch.enable_grad():
            learned = dict(method.learn(block, options))
        nearest = {name: self._nearest(name, weight) for name, weight in block.weights.items()}
        errors = {kind: self._held_error(block, made) for kind, made in (("learn", learned), ("rtn", nearest))}
        worse = not errors["learn"] <= errors["rtn"]  # NaN is no less than anything
        shared = {
            "method": "rtn" if worse else self.work.recipe.method,
            "fallback": "round-to-nearest has less error of the block's output on held-out windows" if worse else None,
            "against_rtn": 1.0 if worse else errors["learn"] / errors["rtn"] if errors["rtn"] else None,
            "seconds": (time.perf_counter() - start) / max(len(learned), 1),
        }
        for name, qtensor in (nearest if worse else learned).items():
            error = measure(block.weights[name], qtensor)
            facts = shared | {"relative_error": error.relative, "largest_error": error.largest}
            self.live.weight(name).copy_(qtensor.dequantize())
            self._settle(self.entries[name], qtensor, facts)

    def _scale_inputs(self, steps: Sequence[Step]) -> None:
        """Scales of inputs that all tokens share, from what the weights of a block that learns read before it does."""
        needs = {site: [_ABSMAX] for step in steps for site in step.sites if self._rounds(site)}
        seen = self._gather(needs) if needs else {}
        for site, found in seen.items():
            for name in self._targets(site):
                self._scale_input(name, found)
        self.memory.forget()  # attention was of weights that will change

    def _rounds(self, site: Site) -> bool:
        """Whether inputs of a site will be rounded."""
        return any(self.entries[name].weight.activations for name in self._targets(site))

    def _held_error(self, block: Block, made: Mapping[str, QTensor]) -> float:
        """Squared difference between the block's output and the float model's on windows that nothing learned from."""
        weights = {name: qtensor.dequantize() for name, qtensor in made.items()}
        found: list[float] = []

        def error_of(window: slice) -> float:
            gap = block.run([window.start], weights).float() - block.target([window.start]).float()
            return float(gap.square().sum(dtype=torch.float64))

        held = [slice(index, index + 1) for index in self.work.windows.held]
        self._in_turn(error_of, held, lambda _, error: found.append(error))
        return sum(found)


def _groups(items: Sequence[Site], size: int) -> list[Sequence[Site]]:
    return [items[at : at + size] for at in range(0, len(items), size)]
