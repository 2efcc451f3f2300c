"""Sensitivity: how much worse the model's predictions get with one weight in one scheme, in nats per token.

To second order the divergence from the original is half the mean of `(g^T E x)^2` over tokens: `x` is what the weight
reads, `E` the error that the method leaves in this scheme, and `g` the gradient, at the layer's output, of the log
probability of a token drawn from the model's own prediction (the Fisher information; Amari 1998,
doi:10.1162/089976698300017746). The model runs forward block by block, hidden states are kept on disk; then backward,
one block in memory at a time, and each block's weights are quantized by the method of the plan in all their schemes.
What stands outside of the blocks is measured as it is: with the embedding or the head replaced. On the same way back it
is measured what rounding inputs of layers, keys and values costs (`narrow.py`), where that is asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from math import inf, prod
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, final

import torch
import xxhash
from jaxtyping import Float, Int64
from torch import Tensor

from lowbit import plugins
from lowbit.blocks import CPU
from lowbit.budget import MARGIN, PIECE, MemoryWatch, anonymous_bytes, format_size, format_sum
from lowbit.errors import ResourceError, UnsupportedError, UsageError
from lowbit.methods import Method, Stats
from lowbit.schemes import Scheme
from lowbit.stages import _slopes
from lowbit.stages._blocks import Entrance, Exit, LiveBlock
from lowbit.stages._jobs import Job, stand_in
from lowbit.stages._model import Blueprint, open_blueprint
from lowbit.stages._observe import Accumulator, Observer, Seen, Windows
from lowbit.stages._products import Product
from lowbit.stages._recipe import step_options
from lowbit.stages._sites import Found, Site, find_steps
from lowbit.stages._slopes import Information, Piece, forward, last_slopes
from lowbit.stages._streams import Streams
from lowbit.stages.budgets.narrow import KEPT, Attended, input_loss, kept_loss
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Entry, Plan, Rules
from lowbit.stages.quantize import Progress, make, one_torch_thread, silent, tensor_stats
from lowbit.stats import Statistic
from lowbit.tensors import QTensor

Losses = dict[str, dict[str, float]]
Offers = Mapping[str, Mapping[str, Entry]]
Judge = Callable[[Job, Seen], float]  # of what a job makes, and of what was seen of its input

VERSION = 1
_FIT, _HELD = 16384, 4096  # tokens that methods learn from, and that errors are judged on
_ROWS = 2048  # of the latter, that are kept for each weight
_BATCH = 4096  # tokens that run through a block together
_LOGITS, _COPIES = 2**22, 8  # that are held at a time, and copies of them, those in float64 counted twice
_JUDGED = 1024  # tokens on which what stands outside of the blocks is judged
_BACKWARD = 4  # activations that are kept for the way back, over those of a forward pass
_BESIDE = 40  # bytes per weight of a piece: rivals of the method, and their errors
_STAND_IN = "gptq"  # for methods that learn a whole block, whose results are like its own but take hours


@final
@dataclass(frozen=True)
class Way:
    """How sensitivities are measured, and the anonymous memory in bytes that it takes at most.

    Attributes:
        parts: bytes by what they are for.
        tokens: that run through a block together.
        piece: weight elements that a worker takes at a time.
        threads: workers.
        sites: inputs whose statistics are accumulated at once; each time all windows run through the block.
    """

    parts: Mapping[str, int]
    tokens: int
    piece: int
    threads: int
    sites: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"{format_size(self.total)} = {format_sum(self.parts)}"

    def lines(self) -> Iterator[str]:
        """What is said of it."""
        yield f"memory: at most {self}"


def plan_way(
    blueprint: Blueprint,
    offers: Offers,
    ids: Tensor,
    limit: int | None,
    threads: int,
    checked: bool = False,
    narrowed: bool = False,
    whole: bool = False,
) -> Way:
    """The fastest way that fits the limit: fewer inputs at once, fewer workers, smaller batches and pieces.

    `checked`: single decisions are measured afterwards; `narrowed`: inputs and cache are rounded too; `whole`: the
    model runs as a whole, twice backward.

    Raises:
        ResourceError: nothing fits; the text names the least limit that works.
    """
    length, base = ids.shape[1], anonymous_bytes() + MARGIN
    later = _decided(blueprint, offers) if checked else 0
    before = 4 * max(_HELD, length) * blueprint.width + 16 * blueprint.width**2 + _watched(blueprint, narrowed)
    held = {"gradients": before} if before >= later else {"decisions": later}  # the first are gone by then
    if whole:  # weights, a probe, gradients, products; and what a window leaves for each way back
        graph = 2 * _BACKWARD * length * blueprint.token_bytes(length) * len(blueprint.blocks)
        held["whole model"] = 4 * blueprint.resident_bytes + graph
    every = max((len(names) for names in blueprint.blocks.values()), default=1)
    ways = [
        Way({"process": base, **held, **_parts(blueprint, offers, length, tokens, piece, workers, sites)},
            tokens, piece, workers, sites)
        for tokens, piece in ((_BATCH, PIECE), (length, PIECE), (length, PIECE >> 4))
        for sites, workers in dict.fromkeys(((every, threads), (1, threads), (1, 1)))
    ]  # fmt: skip
    for way in ways:
        if limit is None or way.total <= limit:
            return way
    least = min(ways, key=lambda way: way.total)
    raise ResourceError(
        f"--ram {format_size(limit or 0)} is too little: measuring for a budget needs at least "
        f"{format_size(least.total)} ({least}); shorter windows (--sequence-length) need less"
    )


def _parts(
    blueprint: Blueprint, offers: Offers, length: int, tokens: int, piece: int, threads: int, sites: int
) -> dict[str, int]:
    """Bytes of one way of working, upper estimates."""
    rows = [(names, [offers[name] for name in names if offers.get(name)]) for names in blueprint.blocks.values()]
    inside = [[next(iter(entries.values())).weight.shape for entries in each] for _, each in rows]
    methods = [_method(entry)[1] for _, each in rows for entries in each for entry in entries.values() if entry.method]
    widths = [sorted((shape[-1] for shape in shapes), reverse=True) for shapes in inside]
    kinds: list[Statistic] = [plugins.load("stats", name) for name in {need for m in methods for need in m.needs}]
    wide, most = (
        max((w for ws in widths for w in ws), default=0),
        max((prod(s) for ss in inside for s in ss), default=0),
    )
    # Weights that read one input come first in the order of widths only by chance: all are counted.
    statistics = max(
        (sum(k.nbytes(w) for w in ws[:sites] for k in kinds) + 4 * _ROWS * sum(ws[:sites]) for ws in widths), default=0
    )
    worker = max((m.prepared(wide) + int((m.workspace + _BESIDE) * min(piece, most)) for m in methods), default=0)
    batch = max(tokens, length)
    return {
        "block": blueprint.streamed_bytes + blueprint.block_bytes,
        "activations": _BACKWARD * batch * blueprint.token_bytes(length) + 4 * _LOGITS * _COPIES,
        "statistics": statistics,
        "working memory": threads * (worker + 3 * 4 * most),
    }


def _watched(blueprint: Blueprint, narrowed: bool) -> int:
    """Bytes of inputs and gradients that are kept of a block's weights, keys and values, and of rounding these."""
    weights, text = blueprint.checkpoint.weights, blueprint.config.get_text_config()
    shapes = [[weights[name].shape for name in names] for names in blueprint.blocks.values()]
    widths = [[shape for shape in each if len(shape) == 2] for each in shapes]
    rows = max((sum(map(sum, each)) for each in widths), default=0)
    if narrowed:
        heads = blueprint.heads
        size = int(getattr(text, "head_dim", None) or blueprint.width // max(heads, 1))
        rows += 4 * heads * size + 3 * max((shape[-1] for each in widths for shape in each), default=0)
    return 4 * _ROWS * rows


def _decided(blueprint: Blueprint, offers: Offers) -> int:
    """Bytes while decisions are checked, when there are no gradients any more.

    All weights of a block, and all outside, in two schemes each; those outside once more as the model has them.
    """
    sizes = {name: 4 * prod(next(iter(row.values())).weight.shape) for name, row in offers.items() if row}
    blocks = [sum(sizes.get(name, 0) for name in names) for names in blueprint.blocks.values()]
    inside = frozenset[str]().union(*blueprint.blocks.values())
    return 2 * max(blocks, default=0) + 3 * sum(size for name, size in sizes.items() if name not in inside)


@final
@dataclass(frozen=True)
class Run:
    """What stays the same from block to block."""

    source: Checkpoint
    plan: Plan
    offers: Offers
    blueprint: Blueprint
    windows: Windows
    streams: Streams
    entrance: Entrance
    way: Way
    watch: MemoryWatch
    progress: Progress
    narrow: Mapping[str, Scheme] = field(default_factory=dict)
    ends: dict[str, Seen] = field(default_factory=dict)  # what outside weights are learned from, once it was measured

    @property
    def held(self) -> slice:
        """The windows that judge."""
        return slice(self.windows.fit, len(self.windows.ids))

    @property
    def tokens(self) -> int:
        """In these windows."""
        return self.windows.ids[self.held].numel()


@contextmanager
def opened(
    source: Checkpoint,
    plan: Plan,
    offers: Offers,
    ids: Int64[Tensor, "windows tokens"],
    folder: Path,
    ram: int | None,
    threads: int,
    watch: MemoryWatch,
    progress: Progress = silent,
    checked: bool = False,
    narrow: Mapping[str, Scheme] = MappingProxyType({}),
    whole: bool = False,
    announce: Callable[[Way], None] = lambda way: None,
) -> Iterator[Run]:
    """What `measure` and `check` work with: the model ran forward, and the inputs of every block are on disk.

    Args:
        plan: any plan of these rules; its options and its importance matrix are used.
        offers: weights, and their entries by scheme.
        ids: windows of text; as many are used as are useful.
        folder: for a temporary folder with hidden states.
        ram: bytes of anonymous memory allowed; None for no limit.
        threads: workers.
        checked: single decisions are measured afterwards.
        narrow: schemes of inputs and of the cache that are measured too, by name.
        whole: the model will run as a whole.
        announce: called with the estimate before anything runs.

    Raises:
        UsageError: fewer than two windows.
        ResourceError: the limit is too small, with the least that works.
        UnsupportedError: the model's blocks cannot be run on their own.
        WeightError: NaN or Inf in a weight.
    """
    windows, blueprint = _windows(ids), open_blueprint(source, torch.float32)
    if not blueprint.blocks:
        raise UnsupportedError(f"{source.path} has no list of blocks to measure; name a scheme for each weight")
    way = plan_way(blueprint, offers, windows.ids, ram, threads, checked, bool(narrow), whole)
    announce(way)
    windows = replace(windows, tokens=way.tokens)
    with TemporaryDirectory(dir=folder, prefix=".sensitivity-") as place:
        shape = (*windows.ids.shape, blueprint.width)
        streams = Streams(Path(place), (shape[0], shape[1], shape[2]), torch.float32, ("float",))
        entrance = Entrance(blueprint, CPU)
        run = Run(source, plan, offers, blueprint, windows, streams, entrance, way, watch, progress, narrow)
        _forward(run)
        yield run


@final
@dataclass(frozen=True)
class Measured:
    """What errors cost.

    Attributes:
        losses: of each weight in each of its schemes.
        narrow: nats per token of inputs, under the name of the first weight that reads one, and of each block's keys
            and values, in each of the schemes that are asked for.
        readers: all weights that read such an input.
    """

    losses: Losses
    narrow: Losses = field(default_factory=dict)
    readers: Mapping[str, Site] = field(default_factory=dict)


def measure(run: Run) -> Measured:
    """The predicted divergence, in nats per token, of each weight in each of its schemes, and of what is narrow.

    Raises:
        WeightError: NaN or Inf in a weight.
    """
    ends = _Ends(run)
    gradients, paths = _last_gradients(run, ends), list(run.blueprint.blocks)
    losses, narrow, readers = Losses(), Losses(), dict[str, Site]()
    for index in range(len(paths) - 1, -1, -1):
        run.progress("measure", len(paths) - 1 - index, len(paths))
        run.watch.check()
        found = _block(run, paths[index], index, gradients)
        losses, narrow, readers = losses | found.losses, found.narrow | narrow, {**found.readers, **readers}
    run.ends.update(ends.finish(gradients))
    losses |= _outside(run, gradients)
    run.progress("measure", len(paths), len(paths))
    return Measured(with_kept(run, losses), narrow, readers)


def with_kept(run: Run, losses: Losses) -> Losses:
    """The losses of all that is on offer: what stays as it is has none."""
    kept = {
        name: {label: 0.0 for label, entry in row.items() if not entry.weight.scheme}
        for name, row in run.offers.items()
    }
    return {name: losses.get(name, {}) | kept[name] for name in run.offers}


def _windows(ids: Int64[Tensor, "windows tokens"]) -> Windows:
    """Windows to learn from, then windows to judge on; no more than are useful."""
    count, length = ids.shape
    if count < 2:
        raise UsageError("a budget needs two windows of text, one to learn from and one to judge on; raise --samples")
    held = min(max(_HELD // length, 1), max(count // 4, 1))
    fit = min(max(_FIT // length, 1), count - held)
    return Windows(ids[: fit + held], fit, _BATCH)


def _forward(run: Run) -> None:
    """Write the inputs of every block, and the last one's outputs."""

    def tick(done: int, total: int) -> None:
        run.progress("forward", done, total)
        run.watch.check()

    forward(run.blueprint, run.entrance, run.windows, run.streams, tick)


def _last_gradients(run: Run, ends: _Ends) -> Float[Tensor, "windows tokens width"]:
    """Gradients at the last block's output, in the windows that judge, for one drawn token at each position."""
    ids, hidden = run.windows.ids[run.held], run.streams.read("float", len(run.blueprint.blocks))[run.held]
    way, judged = Exit(run.blueprint, run.entrance, ids, held=True), _judging(run)
    parts = ((slice(0, judged), None), (slice(judged, None), ends.take if ends.tied else None))
    return torch.cat([last_slopes(way, ids[part], hidden[part], _together(run), take) for part, take in parts])


def _judging(run: Run) -> int:
    """Of the windows that judge those by which what stands outside of the blocks is judged."""
    return max(_JUDGED // run.windows.ids.shape[1], 1)


@final
class _Ends:
    """What embeddings and output layers are learned from: as in a run that calibrates, on fewer tokens.

    Slopes are those of windows that judge weights inside of the blocks alone.
    """

    def __init__(self, run: Run) -> None:
        self._run, blueprint = run, run.blueprint
        needs = {name: {need for e in row.values() if e.method for need in _method(e)[1].needs}
                 for name, row in run.offers.items()}  # fmt: skip
        self._tables, self._heads = (
            {path: {name: needs[name] for name in names if needs.get(name)} for path, names in found.items()}
            for found in (blueprint.tables, blueprint.layers)
        )
        looked = frozenset[str]().union(*self._tables.values())
        self._found = {name: Information(needs[name], 0) for name in looked}

    @property
    def tied(self) -> bool:
        """Whether an embedding is an output layer too."""
        return any(found.keys() & self._found.keys() for found in self._heads.values())

    def take(self, path: str, rows: Tensor) -> None:
        """What an output layer reads, times its slopes: of one that is an embedding too."""
        for name in self._heads.get(path, {}).keys() & self._found.keys():
            self._found[name].read(rows, held=False)

    @torch.no_grad()
    def finish(self, gradients: Float[Tensor, "windows tokens width"]) -> dict[str, Seen]:
        """All of it, from the gradients at the first block's input."""
        run, first = self._run, _judging(self._run)
        learned = run.windows.ids[run.held][first:]
        for ids, slopes in zip(torch.split(learned, 1), torch.split(gradients[first:], 1), strict=True):
            for path, rows in (run.entrance.slopes(ids, slopes) if self._found else {}).items():
                for name in self._tables[path]:
                    self._found[name].slopes(rows, held=False)
        heads = {name: seen for path in self._heads for name, seen in self._read(path).items()}
        return {name: each.finish() for name, each in self._found.items()} | heads

    def _read(self, path: str) -> dict[str, Seen]:
        """What an output layer reads in the windows that methods learn from."""
        run = self._run
        found = {name: Accumulator(sorted(needs), 0, 0) for name, needs in self._heads[path].items()
                 if name not in self._found}  # fmt: skip
        if not found:
            return {}
        last = run.streams.read("float", len(run.blueprint.blocks))
        way = Exit(run.blueprint, run.entrance, run.windows.ids, held=True)
        for batch in run.windows.batches:
            if batch.start < run.windows.fit:
                rows = way.rows(run.windows.ids[batch], last[batch], path).flatten(0, -2)
                for each in found.values():
                    each.take(rows, None, held=False)
        return {name: each.finish() for name, each in found.items()}


def _together(run: Run) -> int:
    """Tokens whose logits are held together."""
    return max(_LOGITS // run.blueprint.vocabulary, 1)


def pieces_of(run: Run, ids: Int64[Tensor, "windows tokens"]) -> Iterator[Piece]:
    """Windows, a run of tokens at a time."""
    return _slopes.pieces_of(ids, _together(run))


@final
class _Probe:
    """Sees the products of passes with gradients: what each weight reads, and the gradients of what it makes.

    Args:
        live: the block.
        step: of these rows one in so many is kept.
    """

    def __init__(self, live: LiveBlock, step: int) -> None:
        self._live, self._step = live, step
        self.seen: dict[str, list[list[Tensor]]] = {}

    def __call__(self, product: Product, result: Tensor) -> Tensor:
        """See a product and what it made."""
        rows = product.rows.detach()[:: self._step].clone()
        pairs = [[rows] for _ in product.names]
        for name, pair in zip(product.names, pairs, strict=True):
            self.seen.setdefault(name, []).append(pair)

        def keep(gradient: Tensor) -> None:
            heights = [len(self._live.weight(name)) for name in product.names]
            flat = gradient.reshape(-1, gradient.shape[-1])[:: self._step]
            for pair, part in zip(pairs, torch.split(flat, heights, -1), strict=True):
                pair.append(part.clone())

        if result.requires_grad:
            result.register_hook(keep)  # type: ignore[no-untyped-call]
        return result

    def pairs(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Rows that a weight reads, and gradients of what it makes of them."""
        return [(pair[0], pair[1]) for pair in self.seen.get(name, []) if len(pair) == 2]


def _block(run: Run, path: str, index: int, gradients: Float[Tensor, "windows tokens width"]) -> Measured:
    """Losses of the weights of one block, and of what is narrow; `gradients` become those at the block's input."""
    live, attended = live_block(run, path), Attended(_step(run)) if run.narrow else None
    every = sites_of(run, live, index)
    probe = _backward(run, live, run.streams.read("float", index), gradients, attended)
    narrow = _narrowed(run, live, every, probe, attended) if attended else Losses()
    losses = judged(run, live, index, every, lambda job, seen: _loss(run, job, probe))
    return Measured(losses, narrow, {site[0]: site for site in every if site[0] in narrow})


def judged(run: Run, live: LiveBlock, index: int, every: Sequence[Site], judge: Judge) -> Losses:
    """What a judge says of each weight of a block in each of its schemes."""
    sites, losses = [site for site in every if any(run.offers.get(name) for name in site)], Losses()
    for at in range(0, len(sites), run.way.sites):
        seen = see(run, live, sites[at : at + run.way.sites], index)
        with one_torch_thread(), torch.no_grad(), ThreadPoolExecutor(run.way.threads, "measure") as pool:
            tasks = [(label, pool.submit(_task, run, live, site, label, seen[site], judge))
                     for site in seen for label in _labels(run, site)]  # fmt: skip
            for label, task in tasks:
                for name, loss in task.result().items():
                    losses.setdefault(name, {})[label] = loss
    return losses


@torch.no_grad()
def _narrowed(run: Run, live: LiveBlock, sites: Sequence[Site], probe: _Probe, attended: Attended) -> Losses:
    """What rounding the inputs, keys and values of a block costs."""
    losses, tokens = Losses(), run.tokens / _step(run)
    for site in sites:
        readers = [(live.weight(name), pairs) for name in site if (pairs := probe.pairs(name))]
        if readers:
            losses[site[0]] = {label: input_loss(readers, scheme, tokens) for label, scheme in run.narrow.items()}
    for name in KEPT:
        if seen := attended.pairs(name):
            losses[f"{live.path} {name}"] = {
                label: kept_loss(seen, scheme, name == "keys") for label, scheme in run.narrow.items()
            }
    return losses


def live_block(run: Run, path: str) -> LiveBlock:
    """A block with its matrices where they can be seen and replaced."""
    names = [name for name in run.blueprint.blocks[path] if len(run.source.weights[name].shape) == 2]
    return LiveBlock(run.blueprint, path, names, CPU)


def sites_of(run: Run, live: LiveBlock, index: int) -> list[Site]:
    """Which weights of a block read one input."""
    steps = find_steps(live, lambda watch: _once(run, live, index, slice(0, 1), watch))
    return [site for step in steps for site in step.sites]


@torch.no_grad()
def _once(run: Run, live: LiveBlock, index: int, batch: slice, watch: Callable[[Product], Any]) -> None:
    inputs = run.streams.read("float", index)[batch]
    live.run(run.entrance.calls(run.windows.ids[batch])[live.path], inputs, watch=watch)


def _labels(run: Run, site: Site) -> list[str]:
    """The schemes on offer for any weight of a site, but for `keep`."""
    entries = [item for name in site for item in run.offers.get(name, {}).items()]
    return list(dict.fromkeys(label for label, entry in entries if entry.weight.scheme))


def _task(run: Run, live: LiveBlock, site: Site, label: str, seen: Seen, judge: Judge) -> dict[str, float]:
    """Losses of the weights of one site in one scheme."""
    return {job.entry.weight.name: judge(job, seen) for job in jobs_of(run, live, site, label, seen)}


def jobs_of(run: Run, live: LiveBlock, site: Site, label: str, seen: Seen) -> Iterator[Job]:
    """The weights of one site in one scheme, to be quantized as the run would; what is prepared is shared."""
    prepared: dict[Any, Stats] = {}
    for name in site:
        entry = run.offers.get(name, {}).get(label)
        if entry is not None and entry.weight.scheme is not None:
            yield _job(run, entry, live.weight(name).contiguous(), seen, prepared)


def _job(run: Run, entry: Entry, weight: Tensor, seen: Seen, prepared: dict[Any, Stats]) -> Job:
    """One weight in one scheme."""
    scheme, (chosen, method) = entry.weight.scheme, _method(entry)
    assert scheme is not None
    if not method.needs <= seen.stats.keys() or method.objection(scheme):
        chosen = stand_in(method, scheme, run.plan.rules)
        method = plugins.load("methods", chosen)
    options = step_options(method, chosen, run.plan.options)
    if (chosen, scheme) not in prepared:
        prepared[chosen, scheme] = method.prepare(seen.stats, scheme, options)
    if not method.needs:  # a run without calibration takes what its method makes, without rivals
        seen = replace(seen, held=torch.empty(0, 0))
    stats = {**prepared[chosen, scheme], **tensor_stats(weight, scheme, run.way.piece)}
    return Job(entry, chosen, weight, stats, seen, options, run.way.piece, weight)


def made_by(job: Job) -> Float[Tensor, "rows cols"]:
    """What a weight becomes."""
    made = job.choose([job.piece(rows) for rows in job.places()])
    return made.qtensor.dequantize().view_as(job.whole)


def see(run: Run, live: LiveBlock, sites: Sequence[Site], index: int) -> dict[Site, Seen]:
    """What the methods on offer need of each site."""
    entries = {site: [e for name in site for e in run.offers.get(name, {}).values() if e.method] for site in sites}
    needs = {site: {need for entry in each for need in _method(entry)[1].needs} for site, each in entries.items()}
    found = {site: Accumulator(sorted(needs[site]), index, run.tokens) for site in sites}
    for batch in run.windows.batches if sites else ():
        observer = Observer(sites, frozenset())
        with suppress(Found):
            _once(run, live, index, batch, observer)
        for site, rows in observer.rows.items():
            found[site].take(rows, None, batch.start >= run.windows.fit)
    return {site: each.finish() for site, each in found.items()}


def _backward(run: Run, live: LiveBlock, inputs: Tensor, gradients: Tensor, attended: Attended | None) -> _Probe:
    """Run the windows that judge forward and backward through a block."""
    probe = _Probe(live, _step(run))
    for batch in run.windows.batches:
        if batch.start < run.windows.fit:
            continue
        at = slice(batch.start - run.windows.fit, batch.stop - run.windows.fit)
        hidden = inputs[batch].clone().requires_grad_()
        with torch.enable_grad(), attended or nullcontext():
            out = live.run(run.entrance.calls(run.windows.ids[batch])[live.path], hidden, after=probe)
            (gradients[at],) = torch.autograd.grad(out, hidden, gradients[at])
    return probe


def _step(run: Run) -> int:
    return max(-(-run.tokens // _ROWS), 1)


def _method(entry: Entry) -> tuple[str, Method]:
    """The method that makes a weight, or stands in for it."""
    assert entry.method is not None
    method: Method = plugins.load("methods", entry.method)
    if not method.learn:
        return entry.method, method
    return _STAND_IN, plugins.load("methods", _STAND_IN)


def _loss(run: Run, job: Job, probe: _Probe) -> float:
    """Half the mean of `(g^T E x)^2`."""
    error = made_by(job) - job.whole
    pairs = probe.pairs(job.entry.weight.name)
    total = sum(float(((x @ error.T) * g).sum(1).double().square().sum()) for x, g in pairs)
    return total * _step(run) / (2 * run.tokens)


@torch.no_grad()
def _outside(run: Run, gradients: Float[Tensor, "windows tokens width"]) -> Losses:
    """Losses of the weights outside of the blocks: of what enters the first block, and of the predictions."""
    return outside(run, lambda entry: _replaced(run, entry, gradients))


def outside(run: Run, loss: Callable[[Entry], float]) -> Losses:
    """What is said of each weight outside of the blocks in each of its schemes."""
    inside = frozenset[str]().union(*run.blueprint.blocks.values())
    return {
        name: {label: loss(entry) for label, entry in entries.items() if entry.weight.scheme}
        for name, entries in run.offers.items()
        if name not in inside
    }


def _replaced(run: Run, entry: Entry, gradients: Float[Tensor, "windows tokens width"]) -> float:
    found = ends_of(run, entry)
    loss = float((found.moved * gradients[: len(found.ids)]).sum(-1).double().square().mean()) / 2
    for piece in pieces_of(run, found.ids):
        before, after = (chances(way, found.ids, found.last, piece) for way in found.ways)
        loss += divergence(before, after) / found.ids.numel()
    return loss


@final
@dataclass(frozen=True)
class Ends:
    """The model with one weight outside of its blocks replaced, on some windows.

    Attributes:
        ids: the windows.
        first: what enters the first block of the model as it is; `moved`: how that changes.
        last: what leaves the last block.
        ways: from there to the logits, as the model is and as it becomes.
    """

    ids: Int64[Tensor, "windows tokens"]
    first: Float[Tensor, "windows tokens width"]
    moved: Float[Tensor, "windows tokens width"]
    last: Float[Tensor, "windows tokens width"]
    ways: tuple[Exit, Exit]


def ends_of(run: Run, entry: Entry) -> Ends:
    """What a weight outside of the blocks changes."""
    blueprint = replaced(run, {entry.weight.name: made_outside(run, entry)})
    judged = slice(0, _judging(run))
    ids, entrance = run.windows.ids[run.held][judged], Entrance(blueprint, CPU)
    first, last = (run.streams.read("float", at)[run.held][judged] for at in (0, len(run.blueprint.blocks)))
    moved = torch.cat([entrance.hidden(batch) for batch in torch.split(ids, 1)]) - first
    return Ends(ids, first, moved, last, (Exit(run.blueprint, run.entrance, ids), Exit(blueprint, entrance, ids)))


def chances(way: Exit, ids: Tensor, hidden: Tensor, piece: Piece) -> Float[Tensor, "tokens vocabulary"]:
    """Logarithms of what is predicted after each token of a piece."""
    return way.logits(ids[piece][None], hidden[piece][None])[0].double().log_softmax(-1)


def divergence(before: Float[Tensor, "tokens vocabulary"], after: Float[Tensor, "tokens vocabulary"]) -> float:
    """KL of the one from the other, the sum over the tokens."""
    return float((before.exp() * (before - after)).sum())


def made_outside(run: Run, entry: Entry) -> Tensor:
    """What a weight outside of the blocks becomes; by who needs no statistics, where none were taken."""
    name, method = entry.weight.name, _method(entry)[1] if entry.method else None
    if method and method.needs and name in run.ends:
        return made_by(_job(run, entry, run.source.tensor(name).float(), run.ends[name], {}))
    if method and method.needs and entry.weight.scheme:
        entry = replace(entry, method=stand_in(method, entry.weight.scheme, run.plan.rules))
    made = make(run.source, run.plan, entry, PIECE)
    return made.dequantize() if isinstance(made, QTensor) else made


def replaced(run: Run, values: Mapping[str, Tensor]) -> Blueprint:
    """The model with these weights outside of its blocks, and those tied to them, as they become."""
    source, edits = run.source, dict(run.source.edits)
    for name, value in values.items():
        edits |= dict.fromkeys((name, *(n for n, to in source.tied.items() if to == name)), _constant(value))
    return open_blueprint(replace(source, edits=edits), torch.float32)


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


@final
@dataclass(frozen=True)
class Sensitivity:
    """What was measured, and under which conditions; data that is saved and used again.

    Attributes:
        facts: what must be the same for the losses to hold: model, format, recipe, options and text.
        losses: nats per token, by weight and scheme.
        narrow: the same of inputs, keys and values; `readers`: the weights that read an input, by the first.
    """

    facts: Mapping[str, Any]
    losses: Losses
    narrow: Losses = field(default_factory=dict)
    readers: Mapping[str, Site] = field(default_factory=dict)

    def lacking(self, offers: Offers) -> Offers:
        """What is on offer and was not measured."""
        rows = {
            name: {s: entry for s, entry in row.items() if s not in self.losses.get(name, {})}
            for name, row in offers.items()
        }
        return {name: row for name, row in rows.items() if row or name not in self.losses}

    def of(self, offers: Offers) -> Losses:
        """The losses of what is on offer, in its order."""
        known = {name: self.losses.get(name, {}) for name in offers}
        return {name: {s: known[name][s] for s in entries if s in known[name]} for name, entries in offers.items()}

    def lacking_narrow(self, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Those of these schemes of inputs and cache that were not measured."""
        known = [row.keys() for row in self.narrow.values()] if self.readers else []
        return {name: each for name, each in schemes.items() if not known or any(name not in row for row in known)}

    def narrow_of(self, schemes: Sequence[str]) -> Losses:
        """Losses of inputs and cache in these schemes."""
        return {name: {scheme: row[scheme] for scheme in schemes} for name, row in self.narrow.items()}

    def joined(self, more: Measured) -> Sensitivity:
        """With what was measured under these conditions beside it."""
        losses, narrow = _joined(self.losses, more.losses), _joined(self.narrow, more.narrow)
        return replace(self, losses=losses, narrow=narrow, readers={**self.readers, **more.readers})

    def to_json(self) -> str:
        """The whole as JSON, one weight a line."""
        head = json.dumps({"lowbit_sensitivity": VERSION, **self.facts})[:-1]
        more = f', "narrow": {{\n{_rows(self.narrow)}\n}}' if self.narrow else ""
        more += f', "readers": {{\n{_rows(self.readers)}\n}}' if self.readers else ""
        return f'{head}, "losses": {{\n{_rows(self.losses)}\n}}{more}}}\n'


def _rows(rows: Mapping[str, Any]) -> str:
    return ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())


def _joined(one: Losses, other: Losses) -> Losses:
    return {name: {**one.get(name, {}), **other.get(name, {})} for name in {**one, **other}}


def conditions(source: Checkpoint, rules: Rules, sha256: str, measure: str = "fisher") -> dict[str, Any]:
    """Under what a measurement holds: model, format, recipe with its options, text by its hash, and the measure."""
    inputs = [source.config, {name: [str(spec.dtype), spec.shape] for name, spec in source.specs.items()}]
    recipe, options = rules.recipe()
    return {
        "model": xxhash.xxh3_128_hexdigest(json.dumps(inputs, sort_keys=True, default=str).encode()),
        "format": rules.format.replace("_", "-"),
        "recipe": str(recipe),
        "options": json.loads(json.dumps(options)),
        "text": sha256,
        "measure": measure,
    }


def read_sensitivity(path: Path, facts: Mapping[str, Any]) -> Sensitivity:
    """A saved measurement, if it was made under these conditions.

    Raises:
        UsageError: it is none, or was made under others; the text names the first.
    """
    try:
        data = json.loads(path.read_text())
        version, tables = data.pop("lowbit_sensitivity"), (data.pop("losses"), data.pop("narrow", {}))
        losses, narrow = (
            {name: {scheme: _number(loss) for scheme, loss in row.items()} for name, row in table.items()}
            for table in tables
        )
        data.setdefault("measure", "fisher")  # files of before there were others
        readers = {name: tuple(map(str, row)) for name, row in data.pop("readers", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} holds no sensitivities: {type(error).__name__}: {error}") from None
    if version != VERSION:
        raise UsageError(f"{path}: sensitivities of version {version}, this lowbit reads {VERSION}")
    for key in {**data, **facts}:
        if data.get(key) != facts.get(key):
            raise UsageError(
                f"{path} was measured with {key} {data.get(key)!r}, not {facts.get(key)!r}; name another --sensitivity"
            )
    return Sensitivity(data, losses, narrow, readers)


def _number(loss: Any) -> float:
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 <= loss < inf:
        raise ValueError(f"{loss!r} is no loss")
    return float(loss)
