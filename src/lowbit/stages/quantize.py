"""Quantize: run the plan, weight by weight, in pieces of rows, on all threads, within the memory limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from types import MappingProxyType
from typing import Any, TypeVar, final

import torch
import xxhash
from torch import Tensor

from lowbit import native, plugins
from lowbit.budget import Estimate, MemoryWatch, plan_memory
from lowbit.errors import WeightError
from lowbit.formats import Weight
from lowbit.formats._gguf import file_columns, turned_back
from lowbit.methods import Method, Stats
from lowbit.methods._scales import nest
from lowbit.schemes import Block, Scheme
from lowbit.stages._imatrix import Importance
from lowbit.stages._pages import kept_pages
from lowbit.stages._recipe import step_options
from lowbit.stages._store import Rows, Value, store
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Entry, Plan, importance_of
from lowbit.stages.write import Output, as_bytes
from lowbit.tensors import QTensor, Shape, block_size, level_table, scale_shape, view_shape

MEAN_SQUARE = "mean_square"
_LOOKED_AT = 64  # rows of a tensor that are looked at together
NOTHING: Stats = MappingProxyType({})
Progress = Callable[[str, int, int], None]
T = TypeVar("T")
R = TypeVar("R")


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


@final
@dataclass(frozen=True)
class Error:
    """Squared error of a quantized weight, its sum of squares, and its largest deviation."""

    squared: float = 0.0
    power: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Error) -> Error:
        return Error(self.squared + other.squared, self.power + other.power, max(self.largest, other.largest))

    @property
    def relative(self) -> float:
        """Squared error over the sum of squares; 0 where both are."""
        return self.squared / self.power if self.power else float(self.squared > 0)

    @property
    def facts(self) -> dict[str, Any]:
        """As the journal has it."""
        return {"relative_error": self.relative, "largest_error": self.largest}


@final
class Seen:
    """What was read of a weight so far, and the error of what became of it."""

    def __init__(self) -> None:
        self.error = Error()
        self._hasher = xxhash.xxh3_128()

    def add(self, part: Tensor, piece: QTensor) -> None:
        """A contiguous part of a weight, and what it became."""
        self._hasher.update(as_bytes(part))
        self.error += measure(part, piece)

    @property
    def digest(self) -> str:
        """Of all parts, one after the other."""
        return self._hasher.hexdigest()


def estimate_memory(plan: Plan, limit: int | None, threads: int, read: int = 0) -> Estimate:
    """What `quantize` will hold, and how it must work to stay under the limit.

    `read`: bytes that a weight takes in memory where it is no view of a file.

    Raises:
        ResourceError: the limit is too small, with the least that works.
    """
    chosen = [(entry.weight, entry.weight.scheme, entry.method) for entry in plan.entries if entry.weight.scheme]
    scales = [prod(scale_shape(weight.shape, scheme.block)) for weight, scheme, _ in chosen]
    apart = [entry.source_bytes for entry in plan.entries if len(entry.weight.rows) > 1]  # gathered from the file
    methods: list[Method] = [plugins.load("methods", name) for name in {name for *_, name in chosen if name}]
    return plan_memory(
        limit=limit,
        threads=threads,
        element_bytes=max((method.workspace for method in methods), default=0.0),
        buffers=max((_buffers(plan, entry) for entry in plan.entries if entry.weight.scheme), default=0),
        fixed=16 * max(scales, default=0) + max(apart, default=0) + read,
        shared=plan.imatrix.memory if plan.imatrix else 0,
    )


def _buffers(plan: Plan, entry: Entry) -> int:
    """Bytes of a weight's codes, as they are made and as they are read back, and of what is stored."""
    return 2 * prod(entry.weight.shape) + plan.stored_bytes(entry)


def quantize(
    checkpoint: Checkpoint, plan: Plan, output: Output, way: Estimate, watch: MemoryWatch, progress: Progress = silent
) -> None:
    """Make every weight of the plan that `output` does not have yet.

    Raises:
        WeightError: NaN or Inf in a weight, naming tensor and index.
        ResourceError: the disk is full, or the memory limit was passed.
    """
    todo = [entry for entry in plan.entries if entry.weight.name not in output.records and not entry.tied]
    total = sum(entry.source_bytes for entry in plan.entries if not entry.tied)
    done = total - sum(entry.source_bytes for entry in todo)
    progress("quantize", done, total)
    with one_torch_thread(), kept_pages(), ThreadPoolExecutor(way.threads, "quantize") as pool:
        worker = _Worker(checkpoint, plan, output, way, importance_of(plan, checkpoint))
        for entry, _ in as_done(pool, worker.run, output.by_size(todo), 2 * way.threads):
            watch.check()
            done += entry.source_bytes
            progress("quantize", done, total)


def as_done(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[tuple[T, R]]:
    """Run `work` over the items, at most `ahead` submitted at a time; yield each as it ends; an error stops all."""
    running: dict[Future[R], T] = {}
    queue = iter(items)
    try:
        while True:
            for item in islice(queue, ahead - len(running)):
                running[pool.submit(work, item)] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        for future in running:
            future.cancel()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Workers are the parallelism; torch's own threads would fight them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@final
@dataclass(frozen=True)
class _Worker:
    """Turns one entry of the plan into a finished weight of the output; called from several threads."""

    checkpoint: Checkpoint
    plan: Plan
    output: Output
    way: Estimate
    importance: Importance | None

    def run(self, entry: Entry) -> None:
        """Read, quantize, store."""
        start = time.perf_counter()
        tensor = self.checkpoint.tensor(entry.weight.name)
        if not self.way.scratch and entry.weight.scheme and self.plan.rules.by_rows(entry.weight) == 1:
            self._store(entry, self._rows(entry, tensor), tensor, {}, start)
            return
        with self.output.codes(entry.weight, self.way.scratch) as codes:
            if codes is None:
                self._store(entry, _kept(entry.weight, tensor).contiguous(), tensor, {}, start)
                return
            stats = _given(self.importance, entry)
            source, value, error = quantize_weight(self.plan.options, entry, tensor, codes, self.way.piece, stats)
            self._store(entry, value, source, error.facts, start)

    def _store(
        self, entry: Entry, value: Value | Rows, source: Tensor | str, facts: Mapping[str, Any], start: float
    ) -> None:
        facts = {**facts, "method": entry.method, "seconds": time.perf_counter() - start}
        store(self.output, entry, value, source, facts, scratch=self.way.scratch, workers=self.way.threads)

    def _rows(self, entry: Entry, tensor: Tensor) -> Rows:
        """A weight that is stored some rows after the other, as they are made."""
        seen, stats, shape = Seen(), _given(self.importance, entry), entry.weight.shape

        def room(rows: slice, cols: slice) -> Tensor:
            return self.output.room("codes", (rows.stop - rows.start, shape[1]))

        made = _pieces(self.plan.options, entry, tensor, tensor, room, self.way.piece, stats, seen)
        again = lambda: make(self.checkpoint, self.plan, entry, self.way.piece)
        return Rows((piece for *_, piece in made), lambda: (seen.digest, seen.error.facts), again)


def make(checkpoint: Checkpoint, plan: Plan, entry: Entry, piece: int) -> QTensor | Tensor:
    """What the plan means for one weight, in memory."""
    tensor = checkpoint.tensor(entry.weight.name)
    if entry.weight.scheme is None:
        return _kept(entry.weight, tensor)
    codes = torch.empty(view_shape(entry.weight.shape, entry.weight.scheme.block), dtype=torch.uint8)
    stats = _given(importance_of(plan, checkpoint), entry)
    return quantize_weight(plan.options, entry, tensor, codes, piece, stats)[1]


def _given(importance: Importance | None, entry: Entry) -> Stats:
    """The statistics of a weight that come from a file."""
    method: Method = plugins.load("methods", entry.method or "rtn")
    found = importance.of(entry.weight) if importance and MEAN_SQUARE in method.needs else None
    return {} if found is None else {MEAN_SQUARE: found}


def _kept(weight: Weight, tensor: Tensor) -> Tensor:
    """A weight that is not quantized, in the type in which it is stored."""
    value = tensor.to(weight.dtype)
    if weight.dtype == torch.float16 and tensor.dtype != torch.float16 and not value.isfinite().all():
        raise WeightError(f"{weight.name} has values that float16 does not hold; store it in another type, as bf16")
    return value


def quantize_weight(
    chosen: Mapping[str, Any], entry: Entry, tensor: Tensor, codes: Tensor, elements: int, given: Stats = NOTHING
) -> tuple[str, QTensor, Error]:
    """Run the entry's method over pieces of a weight; returns the digest of the input, the result and its error.

    Args:
        chosen: options of the method, as a plan has them.
        codes: room for those of the result.
        elements: of a piece.
        given: statistics of the weight's inputs.
    """
    weight, seen, pieces = entry.weight, Seen(), []
    columns = file_columns(weight)  # in the order in which a file has them, which is that of its blocks
    view = (tensor if columns is None else tensor[:, columns]).reshape(codes.shape)
    room = lambda rows, cols: codes[rows, cols]
    for rows, cols, piece in _pieces(chosen, entry, tensor, view, room, elements, given, seen):
        if piece.codes.data_ptr() != codes[rows, cols].data_ptr():
            codes[rows, cols] = piece.codes
        pieces.append((piece.scales, piece.shifts))
    made = join(weight, codes, pieces)
    return seen.digest, made if columns is None else turned_back(made, columns), seen.error


def _pieces(
    chosen: Mapping[str, Any],
    entry: Entry,
    tensor: Tensor,
    view: Tensor,
    room: Callable[[slice, slice], Tensor],
    elements: int,
    given: Stats,
    seen: Seen,
) -> Iterator[tuple[slice, slice, QTensor]]:
    """What the entry's method makes of each piece of a weight, rows and columns before it.

    Args:
        tensor, view: the weight as the checkpoint has it, and in two axes, its columns in the order of blocks.
        room: for the codes of a piece, which methods without `into` leave as it is.
        seen: gets what was read.
    """
    weight, scheme = entry.weight, entry.weight.scheme
    assert scheme is not None and entry.method is not None
    method: Method = plugins.load("methods", entry.method)
    options = step_options(method, entry.method, chosen)
    with _located(weight.name, tensor):
        stats = {**given, **tensor_stats(view, scheme, elements)}
        for rows, cols in pieces_of(weight.shape, scheme.block, elements):
            part = view[rows, cols].contiguous()
            if method.into:
                piece = method.into(part, stats, scheme, options, room(rows, cols))
            else:
                piece = method.quantize(part, stats, scheme, options)
            seen.add(part, piece)
            yield rows, cols, piece


def pieces_of(shape: Shape, block: Block, elements: int) -> Iterator[tuple[slice, slice]]:
    """Cut a weight's 2-D view into runs of about `elements` that end on block borders (columns where flat)."""
    rows, cols = view_shape(shape, block)
    if block.flat:
        step = max(elements // block.cols, 1) * block.cols
        yield from ((slice(0, 1), slice(at, min(at + step, cols))) for at in range(0, cols, step))
        return
    high = max(block.rows, 1)
    step = max(elements // max(cols * high, 1), 1) * high
    yield from ((slice(at, min(at + step, rows)), slice(0, cols)) for at in range(0, rows, step))


Part = Tensor | QTensor


def join(weight: Weight, codes: Tensor, pieces: Sequence[tuple[Part, Part | None]]) -> QTensor:
    """One `QTensor` from the scales and zero points (or minima) of its pieces; offset ones are quantized here."""
    scheme = weight.scheme
    assert scheme is not None
    blocks = scale_shape(weight.shape, scheme.block)
    shared = scheme.block.rows == 0 and not scheme.block.flat
    axis = 1 if scheme.block.flat else 0
    zeros = [zero for _, zero in pieces if zero is not None]
    scales = _join([scale for scale, _ in pieces], shared, axis, blocks)
    if scheme.nested and scheme.nested.offset:
        assert isinstance(scales, Tensor)
        scales = nest(scales, scheme.nested)
    joined = _join(zeros, shared, axis, blocks) if zeros else None
    if scheme.zero == "min":
        return QTensor(scheme, weight.shape, codes, scales, minima=joined)
    assert not isinstance(joined, QTensor)
    return QTensor(scheme, weight.shape, codes, scales, joined)


def _join(parts: Sequence[Part], shared: bool, axis: int, blocks: Shape) -> Part:
    """Scales (or zero points) of all pieces in one; blocks that span all rows are the same in every piece."""
    first = parts[0]
    if shared:
        return first
    if isinstance(first, QTensor):
        nested = [part for part in parts if isinstance(part, QTensor)]
        codes = torch.cat([part.codes for part in nested], axis)
        above = _join([part.scales for part in nested], first.scheme.block.rows == 0, axis, ())
        return replace(first, shape=blocks, codes=codes, scales=above)
    return torch.cat([part for part in parts if isinstance(part, Tensor)], axis)


def measure(weight: Tensor, qtensor: QTensor) -> Error:
    """Error of a quantized weight; sums are accumulated in float64."""
    block = block_size(qtensor.shape, qtensor.scheme.block)
    table = level_table(qtensor.scheme.grid)
    scales, zeros, minus = qtensor.scale_values(), qtensor.zero_values(), qtensor.scheme.zero == "min"
    return Error(*native.error(weight, qtensor.codes, scales, zeros, table, *block, minus=minus))


def tensor_stats(view: Tensor, scheme: Scheme, elements: int) -> Stats:
    """The range of the whole tensor, where one scale depends on all of it."""
    whole = any(part.block.rows == 0 and not part.block.flat for part in (scheme, scheme.nested) if part)
    if not whole:
        return {}
    low, high = [], []
    for rows, cols in pieces_of(tuple(view.shape), Block(1, 0), elements):
        smallest, largest, _ = native.block_range(view[rows, cols].contiguous(), view.shape[0], view.shape[1])
        low.append(smallest.min())
        high.append(largest.max())
    return {"range": torch.stack([torch.stack(low).min(), torch.stack(high).max()])} if low else {}


@contextmanager
def _located(name: str, tensor: Tensor) -> Iterator[None]:
    """A method sees a piece of a weight: name the tensor, and the place in the whole, of what it cannot store."""
    try:
        yield
    except WeightError:
        refuse_not_finite(name, tensor)
        raise


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Raise `WeightError` where a weight to quantize has NaN or Inf."""
    fault = not_finite(name, tensor)
    if fault:
        raise WeightError(f"{fault}; repair the checkpoint, or leave the tensor as it is with --skip")


def not_finite(name: str, tensor: Tensor) -> str | None:
    """The first NaN or Inf of a tensor, with its name and its place; None where there is none."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.view(1, 1)
    for at in range(0, len(rows), _LOOKED_AT):
        wrong = (~rows[at : at + _LOOKED_AT].isfinite()).nonzero()
        if len(wrong):
            row, col = at + int(wrong[0, 0]), int(wrong[0, 1])
            place = f"row {row}, column {col}" if tensor.dim() > 1 else f"element {col}"
            return f"{name}: {rows[row, col].item()} at {place}"
    return None
