"""Ends: the weights before and after the blocks, made on what they do to the model, and seen by the blocks.

Rows of an embedding enter the stream as they are: no input's second moment says which errors matter. The gradients of
the predictions at its output say it; their second moment, the Fisher information, takes the place of that of inputs
(`_information.py`). It is made first, and the blocks are calibrated on what it looks up. The output layer is made last,
on what the quantized blocks give it; one that is the embedding too is made with it, on the sum of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from lowbit.stages._blocks import Entrance, Exit
from lowbit.stages._cost import Outside, needs_of
from lowbit.stages._information import Backward
from lowbit.stages._observe import Accumulator, Seen
from lowbit.stages._pages import give_back
from lowbit.stages._rows import rows_of
from lowbit.stages._slopes import Tick
from lowbit.stages._state import Calibration
from lowbit.stages._step import job_of
from lowbit.stages._store import store
from lowbit.stages.plan import Entry
from lowbit.stages.quantize import one_torch_thread, pieces_of, refuse_not_finite
from lowbit.stages.write import allocate


@final
class Ends:
    """Makes those of a run: embeddings, and output layers whose method learns from text."""

    def __init__(self, work: Calibration, planned: Outside, tick: Tick) -> None:
        self._work, self._ends, self._tick = work, planned, tick

    def make_tables(self, blocks: Sequence[int] = ()) -> None:
        """Quantize and store embeddings that are not there yet; with them the information at these blocks is had."""
        # Before anything is made of them: statistics of what is computed name no tensor.
        for name in self._ends.names - self._work.output.records.keys():
            refuse_not_finite(name, self._work.source.tensor(name))
        missing = [e for e in self._ends.tables.values() if e.weight.name not in self._work.output.records]
        sloped = {entry.weight.name: entry for entry in missing if needs_of(entry)}
        asked = self._work.information
        blocks = [index for index in blocks if asked and not asked.there("information", index)]
        seen = Backward(self._work, sloped, blocks, self._tick).run() if sloped or blocks else {}
        for entry in missing:
            self._make(entry, seen.get(entry.weight.name, Seen({}, torch.empty(0, 0), 0)))
        give_back()  # what passes left in heaps

    def entrance(self) -> Entrance:
        """What stands before the blocks, with the embeddings as they are stored."""
        work = self._work
        paths = [path for path, names in work.blueprint.tables.items() if names & self._ends.tables.keys()]
        tables = {path: self._table(path, index) for index, path in enumerate(paths)}
        return Entrance(work.blueprint, work.device, tables) if tables else work.entrance

    def make_heads(self, last: int) -> None:
        """Quantize and store output layers that are not there yet; `last`: number of blocks."""
        work, heads = self._work, self._ends.heads
        missing = {name: entry for name, entry in heads.items() if name not in work.output.records}
        paths = [path for path, names in work.blueprint.layers.items() if names & missing.keys()]
        if not paths:
            return
        way = Exit(work.blueprint, work.entrance, work.windows.ids)
        for path in paths:
            names = work.blueprint.layers[path] & missing.keys()
            held = work.windows.ids[work.windows.fit :].numel()
            found = {name: Accumulator(sorted(needs_of(missing[name])), 0, held) for name in names}
            for batch in work.windows.batches:
                rows = {kind: way.rows(work.windows.ids[batch], work.streams.read(kind, last)[batch], path)
                        for kind in work.streams.kinds}  # fmt: skip
                flat = {kind: each.flatten(0, -2) for kind, each in rows.items()}
                for each in found.values():
                    each.take(flat[work.inputs], flat.get("float"), batch.start >= work.windows.fit)
            for name, each in found.items():
                self._make(missing[name], each.finish())

    def _make(self, entry: Entry, seen: Seen) -> None:
        work, name = self._work, entry.weight.name
        tensor = work.source.tensor(name)
        job = job_of(entry, tensor, tensor, seen, {}, work, seen.useless if needs_of(entry) else None)
        with one_torch_thread():
            made = job.choose(list(work.pool.map(job.piece, job.places())))
        store(work.output, entry, made.qtensor, tensor, {**made.facts, "folded": False}, scratch=True)

    def _table(self, path: str, index: int) -> Tensor:
        """An embedding as it is stored, in the type of the computation, in a mapped file."""
        work = self._work
        weights = [work.source.weights[name] for name in work.blueprint.tables[path]]
        rows, cols = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        file = work.streams.folder / f"table-{index}.bin"  # forgotten with the first block's inputs
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w+b") as opened:
            allocate(opened.fileno(), rows * cols * work.blueprint.dtype.itemsize, file)
        table = torch.from_file(str(file), shared=True, size=rows * cols, dtype=work.blueprint.dtype).view(rows, cols)
        for weight in weights:
            places = rows_of(weight.rows).long() if weight.rows else torch.arange(weight.shape[0])
            for part, value in self._values(weight.name):
                table[places[part]] = value.to(table.dtype)
        return table

    def _values(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a weight as they are stored, or will be, and where they are."""
        entry = self._ends.tables.get(name)
        scheme = entry.weight.scheme if entry else None
        if entry is None or scheme is None:
            yield slice(None), self._work.source.tensor(name)
            return
        with self._work.output.codes(entry.weight, True, "table") as codes:
            made = self._work.plan.rules.unpack(entry.weight, self._work.output.read(entry), codes)
            if scheme.block.flat:
                yield slice(None), made.dequantize()
                return
            for part, _ in pieces_of(made.shape, scheme.block, self._work.way.piece):
                yield part, made.rows(part.start, part.stop).dequantize()
