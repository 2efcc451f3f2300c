"""Passes: windows run through a block by all workers, its activations rounded, low-rank terms beside its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar, final

import torch
from torch import Tensor

from lowbit.blocks import Block
from lowbit.stages._activations import rounded
from lowbit.stages._attention import Memory, Remembered, exact_products
from lowbit.stages._observe import Watch
from lowbit.stages._products import Product
from lowbit.stages._sites import Step
from lowbit.stages._state import Calibration, State
from lowbit.stages._streams import Kind
from lowbit.stages.quantize import one_torch_thread

T = TypeVar("T")
After = Callable[[Product, Tensor], Tensor]


@final
class Passes:
    """Runs windows through one block, as it is by now."""

    def __init__(self, work: Calibration, state: State, index: int) -> None:
        self._work, self._state, self.index = work, state, index
        self.inputs = work.streams.read(work.inputs, index)

    @property
    def memory(self) -> Memory:
        """What earlier passes of the block found."""
        return self._work.memory

    def batch(
        self,
        batch: slice | Sequence[int],
        inputs: Tensor | None = None,
        weights: Mapping[str, Tensor] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
        after: After | None = None,
        recall: Remembered | None = None,
    ) -> Tensor:
        """The block's output for some windows."""
        live, hidden = self._state.live, (self.inputs if inputs is None else inputs)[batch]
        call = self._work.call(live.path, len(hidden))
        return live.run(call, hidden, weights, parameters, watch or self.rounding(), self._beside(after), recall)

    def _beside(self, after: After | None) -> After | None:
        """Adds to each product what the low-rank terms make of its rows, which are not rounded, then calls `after`."""
        live, terms = self._state.live, self._state.terms
        if not terms:
            return after

        def add(product: Product, result: Tensor) -> Tensor:
            heights = [len(live.weight(name)) for name in product.names]
            for name, part in zip(product.names, torch.split(result, heights, -1), strict=True):
                for term in terms.get(name, {}).values():
                    thin = product.rows @ term.down.T.to(result)
                    part.add_((thin @ term.up.T.to(result)).view(part.shape))
            return after(product, result) if after else result

        return add

    def rounding(self, factors: Mapping[str, Tensor] | None = None) -> Watch | None:
        """A watch that rounds activations, of the weights that are on their grid by now; None where none is rounded."""
        state = self._state
        rounds = {n: e.weight.activations for n, e in state.entries.items() if e.weight.activations}
        if not rounds:
            return None

        def watch(product: Product) -> Tensor | None:
            scheme, name = rounds.get(product.names[0]), product.names[0]
            if scheme is None or (factors is None and name not in state.made):
                return None
            rows, smoothing = product.rows.cpu(), (factors or {}).get(name)
            if name in state.factors:
                smoothing = (torch.ones(()) if smoothing is None else smoothing) / state.factors[name]
            return rounded(rows, scheme, state.scales.get(name), smoothing).to(product.rows.device)

        return watch

    def forward(self, kind: Kind) -> None:
        """Write what the block makes of all windows of a stream."""
        inputs = self._work.streams.read(kind, self.index)

        def pass_on(batch: slice) -> None:
            recall = Remembered(self.memory, kind, batch, lambda: False)
            outputs[batch] = self.batch(batch, inputs, recall=recall)

        with self._work.streams.writing(kind, self.index + 1) as outputs:
            self.in_turn(pass_on, self._work.windows.batches)

    def in_turn(
        self, work: Callable[[slice], T], batches: Sequence[slice], take: Callable[[slice, T], None] | None = None
    ) -> None:
        """Work on each batch by all workers, each on its own batch; then `take` what was found, in order.

        Small products gain nothing from threads of their own, and waking these costs more than the products.
        """
        for size in {batch.stop - batch.start for batch in batches}:
            self._work.call(self._state.live.path, size)  # recorded before: a recording is a pass of its own

        def quietly(batch: slice, before: Future[None] | None) -> None:
            with torch.no_grad():
                found = work(batch)
                if take:
                    wait([before] if before else [])  # a worker that had it began it before
                    take(batch, found)

        with exact_products(self._work.blueprint.dtype), one_torch_thread():
            futures: list[Future[None]] = []
            for batch in batches:
                futures.append(self._work.pool.submit(quietly, batch, futures[-1] if futures else None))
            try:
                for future in futures:
                    future.result()
            finally:
                wait([future for future in futures if not future.cancel()])

    def view(self, steps: Sequence[Step], method: str | None = None) -> Block:
        """The block as methods that learn and transforms see it; `method`: of weights that the plan gives to it."""
        work, entries = self._work, self._state.entries
        names = [n for step in steps for n in self._state.targets(step.names) if n not in self._state.lost]
        names = [name for name in names if method in (None, entries[name].method)]
        schemes = {name: entries[name].weight.scheme for name in names}
        activations = {name: entries[name].weight.activations for name in names}
        targets = work.streams.read("float", self.index + 1)

        def run(
            indices: Sequence[int], weights: Mapping[str, Tensor], factors: Mapping[str, Tensor] | None = None
        ) -> Tensor:
            watch = self.rounding(factors or {}) if any(activations.values()) else None
            meant = {name: self._state.meant(name, weight) for name, weight in weights.items()}
            return self.batch(list(indices), weights=meant, watch=watch)

        return Block(
            weights={name: self._state.weight(name) for name in names},
            schemes={name: scheme for name, scheme in schemes.items() if scheme},
            windows=work.windows.fit,
            run=run,
            target=lambda indices: targets[list(indices)],
            nearest=lambda name, weight: self._state.nearest(name, weight).dequantize(),
            activations={name: scheme for name, scheme in activations.items() if scheme},
            seed=self.index,
            threads=work.way.threads if work.device.type == "cpu" else 1,  # a GPU wants few large products
            pool=work.pool,
            device=work.device,
            information=self._information(),
        )

    def _information(self) -> Tensor | None:
        """What errors of the block's output cost, where that is known and a number."""
        streams = self._work.information
        found = streams.read("information", self.index)[0] if streams else None
        return None if found is None or not found.isfinite().all() else found.to(self._work.device)
