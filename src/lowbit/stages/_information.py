"""Information: what the float model's predictions say of errors in embeddings and at the outputs of blocks.

Tokens go forward through the float model, and the gradients of its predictions back (`_slopes.py`), one block in memory
at a time. Their second moment at an embedding takes the place of that of inputs. At a block's output it is the Fisher
information `F` of what the block computes: to second order, an error `e` there makes the predictions of the whole model
diverge by `e^T F e / 2`, where methods that learn from the block alone take `e^T e`.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from lowbit.stages._attention import exact_products
from lowbit.stages._blocks import Exit, LiveBlock
from lowbit.stages._cost import BACK, LOGITS, needs_of, sloped_windows
from lowbit.stages._observe import Seen, Windows
from lowbit.stages._slopes import MOMENT, Information, Tick, forward, last_slopes
from lowbit.stages._state import Calibration
from lowbit.stages._streams import Streams
from lowbit.stages.plan import Entry


@final
class Backward:
    """One way forward through the float model, and back.

    Args:
        work: the run.
        tables: embeddings that are to be learned from it.
        blocks: those whose information is kept, in `work.information`.
        tick: told how far it is.
    """

    def __init__(self, work: Calibration, tables: Mapping[str, Entry], blocks: Collection[int], tick: Tick) -> None:
        self._work, self._blocks, self._tick = work, blocks, tick
        self._windows = _windows(work, bool(tables))
        held = len(self._windows.held) * self._windows.ids.shape[1]
        self._found = {name: Information(needs_of(entry), held) for name, entry in tables.items()}

    def run(self) -> dict[str, Seen]:
        """What was seen of the embeddings."""
        work, windows = self._work, self._windows
        folder, blueprint = work.streams.folder / "slopes", work.blueprint
        shape, count = (*windows.ids.shape, blueprint.width), len(blueprint.blocks)
        streams = Streams(folder, (shape[0], shape[1], shape[2]), blueprint.dtype, ("float",))
        with exact_products(blueprint.dtype):
            forward(blueprint, work.entrance, windows, streams, lambda done, _: self._tick(done, 2 * count))
            slopes = self._at_the_end(streams)
            for index in reversed(range(count)):
                if index in self._blocks:
                    self._keep(index, slopes[: windows.fit])
                if self._found or index > min(self._blocks):
                    self._back(index, streams, slopes)
                self._tick(2 * count - index, 2 * count)
            for batch in windows.batches if self._found else ():
                given = work.entrance.slopes(windows.ids[batch], slopes[batch])
                for name, rows in _by_name(given, blueprint.tables, self._found):
                    self._found[name].slopes(rows, batch.start >= windows.fit)
        shutil.rmtree(folder)
        return {name: each.finish() for name, each in self._found.items()}

    def _at_the_end(self, streams: Streams) -> Tensor:
        """Slopes at the last block's output; output layers that are embeddings take what they read."""
        windows, found = self._windows, self._found
        blueprint, entrance = self._work.blueprint, self._work.entrance
        hidden, way = streams.read("float", len(blueprint.blocks)), Exit(blueprint, entrance, windows.ids)
        slopes, step = [], max(LOGITS // blueprint.vocabulary, 1)
        tied = any(names & found.keys() for names in blueprint.layers.values())
        for part, held in ((slice(0, windows.fit), False), (slice(windows.fit, None), True)):

            def take(path: str, rows: Tensor, held: bool = held) -> None:
                for name, each in _by_name({path: rows}, blueprint.layers, found):
                    found[name].read(each, held)

            slopes.append(last_slopes(way, windows.ids[part], hidden[part], step, take if tied else None))
        return torch.cat(slopes)

    def _keep(self, index: int, slopes: Tensor) -> None:
        """The information at a block's output, one on average along its diagonal; NaN where it is no number."""
        found = Information({MOMENT}, 0)
        found.slopes(slopes, False)
        seen = found.finish()
        assert self._work.information is not None
        with self._work.information.writing("information", index) as kept:
            if seen.useless:
                kept.fill_(torch.nan)
            else:
                kept[0].copy_(seen.stats[MOMENT]).div_(kept[0].diagonal().mean())

    def _back(self, index: int, streams: Streams, slopes: Tensor) -> None:
        """Take slopes from a block's output to its input."""
        work, path = self._work, list(self._work.blueprint.blocks)[index]
        live, inputs = LiveBlock(work.blueprint, path, (), work.device), streams.read("float", index)
        for batch in self._windows.batches:
            hidden = inputs[batch].clone().requires_grad_()
            with torch.enable_grad():
                out = live.run(work.entrance.calls(self._windows.ids[batch])[path], hidden)
                (slopes[batch],) = torch.autograd.grad(out, hidden, slopes[batch])


def _windows(work: Calibration, judged: bool) -> Windows:
    """Some of those that methods learn from, and, where embeddings are judged, of those that judge."""
    windows, width = work.windows, work.blueprint.width
    fit, held = sloped_windows(windows.fit, len(windows.held), windows.ids.shape[1], width)
    ids = torch.cat([windows.ids[:fit], windows.ids[windows.fit : windows.fit + held * judged]])
    return Windows(ids, fit, BACK)


def _by_name(
    given: Mapping[str, Tensor], sources: Mapping[str, frozenset[str]], names: Mapping[str, object]
) -> Iterator[tuple[str, Tensor]]:
    """What is given by path, for each of the names that the module there reads."""
    return ((name, rows) for path, rows in given.items() for name in sources[path] & names.keys())
