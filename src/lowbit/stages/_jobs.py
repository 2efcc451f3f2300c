"""Jobs: one weight, quantized in pieces of rows by the method of the plan and by its rivals; the best is kept.

The judge is the output error on rows that no method saw: `||X (W - W^)^T||^2` over held-out calibration rows `X`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit import plugins
from lowbit.formats import Format
from lowbit.formats._gguf import file_columns, turned_back
from lowbit.methods import Method, Stats
from lowbit.schemes import Scheme
from lowbit.stages._observe import Seen
from lowbit.stages.plan import Entry
from lowbit.stages.quantize import Error, join, pieces_of
from lowbit.tensors import QTensor, view_shape

RIVALS: Mapping[str, Mapping[str, Any]] = {"rtn": {}, "mse": {"steps": 20}}


@final
@dataclass(frozen=True)
class Tally:
    """Sums over rows of a candidate: squared error of the output, and the error of the weight."""

    output: float = 0.0
    error: Error = field(default_factory=Error)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.output + other.output, self.error + other.error)


@final
@dataclass(frozen=True)
class Piece:
    """Candidates for a run of rows: each method's result and tally; squared output of the weight itself."""

    made: Mapping[str, QTensor]
    tallies: Mapping[str, Tally]
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
        weight: what the codes are made of, in any float type, `[outputs, inputs]`.
        stats: prepared for the method.
        seen: at its site.
        options: of the method.
        elements: of a piece.
        whole: the weight that the codes and the low-rank terms beside them stand for: `weight` and these terms.
        lost: why calibration could not do what the plan says; None where it could.
    """

    entry: Entry
    method: str
    weight: Float[Tensor, "rows cols"]
    stats: Stats
    seen: Seen
    options: Any
    elements: int
    whole: Float[Tensor, "rows cols"]
    lost: str | None = None

    @property
    def scheme(self) -> Scheme:
        """Of the weight."""
        assert self.entry.weight.scheme is not None
        return self.entry.weight.scheme

    @cached_property
    def methods(self) -> dict[str, tuple[Method, Any]]:
        """The method of the job, and those it is compared with."""
        found = {self.method: (_load(self.method), self.options)}
        for name, options in RIVALS.items():
            method = _load(name)
            if self.seen.held.any() and name not in found and method.objection(self.scheme) is None:
                found[name] = (method, method.options(**options))
        return found

    def places(self) -> Iterator[slice]:
        """Rows of each piece."""
        rows, cols = self.weight.shape
        if self.scheme.block.flat:
            return iter([slice(0, rows)])
        return (part for part, _ in pieces_of((rows, cols), self.scheme.block, self.elements))

    def piece(self, rows: slice) -> Piece:
        """All candidates for some rows."""
        start = time.perf_counter()
        part, whole = (each[rows].float().contiguous() for each in (self.weight, self.whole))
        columns = file_columns(self.entry.weight)  # blocks are of these, and methods that calibrate are left out
        held = part if columns is None else part[:, columns].contiguous()
        view = held.reshape(view_shape((part.shape[0], part.shape[1]), self.scheme.block))
        made = {name: m.quantize(view, self.stats, self.scheme, options) for name, (m, options) in self.methods.items()}
        made = made if columns is None else {name: turned_back(q, columns) for name, q in made.items()}
        tallies = {name: self._tally(part, whole, q) for name, q in made.items()}
        return Piece(made, tallies, self._output_power(whole), time.perf_counter() - start)

    def _tally(self, part: Float[Tensor, "some cols"], whole: Float[Tensor, "some cols"], made: QTensor) -> Tally:
        gap = made.dequantize().view_as(part) - part
        return Tally(self._output_power(gap), Error(_power(gap), _power(whole), float(gap.abs().max())))

    def _output_power(self, part: Float[Tensor, "some cols"]) -> float:
        held = self.seen.held
        return _power(held @ part.T) if held.numel() else 0.0

    def choose(self, pieces: Sequence[Piece]) -> Made:
        """The candidate with the least output error on held-out rows; the plan's method among equals."""
        sums = {name: sum((piece.tallies[name] for piece in pieces), Tally()) for name in self.methods}
        best = min(sums, key=lambda name: (sums[name].output, name != self.method))
        power, rtn = sum(piece.power for piece in pieces), sums.get("rtn", Tally())
        facts = {
            "method": best,
            "fallback": self._fallback(best),
            "rows": self.seen.rows,
            "starved": self.seen.starved,
            **sums[best].error.facts,
            "output_error": sums[best].output / power if power else None,
            "against_rtn": sums[best].output / rtn.output if rtn.output else None,
            "seconds": sum(piece.seconds for piece in pieces),
        }
        return Made(self._joined([piece.made[best] for piece in pieces]), facts)

    def _fallback(self, best: str) -> str | None:
        """Why the weight was not made as the plan says."""
        return self.lost or (None if best == self.method else "less output error on held-out rows")

    def _joined(self, parts: Sequence[QTensor]) -> QTensor:
        codes = parts[0].codes if len(parts) == 1 else torch.cat([part.codes for part in parts])
        joined = join(self.entry.weight, codes, [(part.scales, part.shifts) for part in parts])
        return replace(joined, group_index=parts[0].group_index)


def stand_in(method: Method, scheme: Scheme, form: Format) -> str:
    """The method for what calibration does not reach; the format's own encoder where that cannot make the scheme."""
    able = not form.encoder or _load(method.outside).objection(scheme) is None
    return method.outside if able else form.encoder


def _power(values: Tensor) -> float:
    """Sum of squares, in float64."""
    return float(values.square().sum(dtype=torch.float64))


def _load(name: str) -> Method:
    method: Method = plugins.load("methods", name)
    return method
