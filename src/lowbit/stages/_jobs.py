"""Jobs: one weight, quantized in pieces of rows by the method of the plan and by its rivals; the best is kept.

The judge is the output error on rows that no method saw: `||X (W - W^)^T||^2` over held-out calibration rows `X`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit import plugins
from lowbit.methods import Method, Stats
from lowbit.schemes import Scheme
from lowbit.stages._observe import Seen
from lowbit.stages.plan import Entry
from lowbit.stages.quantize import join, pieces_of
from lowbit.tensors import QTensor

RIVALS: Mapping[str, Mapping[str, Any]] = {"rtn": {}, "mse": {"steps": 20}}


@final
@dataclass(frozen=True)
class Piece:
    """Candidates for a run of rows: each method's result, and its squared output error."""

    made: Mapping[str, QTensor]
    errors: Mapping[str, float]
    power: float
    seconds: float


@final
@dataclass(frozen=True)
class Made:
    """The result for one weight, and what the report says of it."""

    qtensor: QTensor
    facts: Mapping[str, Any]


@final
@dataclass(frozen=True, eq=False)
class Job:
    """One weight to quantize.

    Attributes:
        entry: of the plan.
        method: the plan's, or another where calibration did not reach the weight.
        weight: float32, `[outputs, inputs]`.
        stats: prepared for the method.
        seen: at its site.
        options: of the method.
        elements: of a piece.
    """

    entry: Entry
    method: str
    weight: Float[Tensor, "rows cols"]
    stats: Stats
    seen: Seen
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
        found = {self.method: (_load(self.method), self.options)}
        for name, options in RIVALS.items():
            method = _load(name)
            if self.seen.held.any() and name not in found and method.supports(self.scheme) is None:
                found[name] = (method, method.options(**options))
        return found

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each piece."""
        return pieces_of((self.weight.shape[0], self.weight.shape[1]), self.scheme.block, self.elements)

    def piece(self, rows: slice, cols: slice) -> Piece:
        """All candidates for some rows."""
        start, part = time.perf_counter(), self.weight[rows, cols]
        made = {name: m.quantize(part, self.stats, self.scheme, options) for name, (m, options) in self.methods.items()}
        errors = {name: self._output_power(q.dequantize() - part) for name, q in made.items()}
        return Piece(made, errors, self._output_power(part), time.perf_counter() - start)

    def _output_power(self, part: Float[Tensor, "some cols"]) -> float:
        held = self.seen.held
        return float((held @ part.T).square().sum(dtype=torch.float64)) if held.numel() else 0.0

    def choose(self, pieces: Sequence[Piece]) -> Made:
        """The candidate with the least output error on held-out rows; the plan's method among equals."""
        errors = {name: sum(piece.errors[name] for piece in pieces) for name in self.methods}
        best = min(errors, key=lambda name: (errors[name], name != self.method))
        qtensor = self._joined([piece.made[best] for piece in pieces])
        power, rtn = sum(piece.power for piece in pieces), errors.get("rtn")
        facts = {
            "method": best,
            "fallback": self._fallback(best),
            "rows": self.seen.rows,
            "starved": self.seen.starved,
            **error_facts(self.weight, qtensor),
            "output_error": errors[best] / power if power else None,
            "against_rtn": errors[best] / rtn if rtn else None,
            "seconds": sum(piece.seconds for piece in pieces),
        }
        return Made(qtensor, facts)

    def _fallback(self, best: str) -> str | None:
        """Why the method is not the plan's."""
        if self.method != self.entry.method:
            return "no calibration row reached it"
        return None if best == self.method else "less output error on held-out rows"

    def _joined(self, parts: Sequence[QTensor]) -> QTensor:
        codes = torch.cat([part.codes for part in parts], 1 if self.scheme.block.flat else 0)
        joined = join(self.entry.weight, codes, [(part.scales, part.zeros) for part in parts])
        return replace(joined, group_index=parts[0].group_index)


def error_facts(weight: Float[Tensor, "rows cols"], qtensor: QTensor) -> dict[str, float]:
    """Relative squared and largest error of a result."""
    gap = qtensor.dequantize() - weight
    squared, power = (float(each.square().sum(dtype=torch.float64)) for each in (gap, weight))
    return {"relative_error": squared / power if power else 0.0, "largest_error": float(gap.abs().max())}


def _load(name: str) -> Method:
    method: Method = plugins.load("methods", name)
    return method
