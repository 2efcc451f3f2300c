"""SignRound: rounding and ranges learned by signed gradients, block by block. See `docs/methods/autoround.md`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.blocks import Block
from lowbit.methods import Method, Stats
from lowbit.methods._learn import CHUNK, Grouped, best_of, descend, grouped, range_slopes, rounded
from lowbit.methods._scales import finish, finite_range, fit, global_divisor
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor

_FROZEN = ("e8m0",)
_REACH = 0.5 - 2.0**-12  # a weight that is a level stays this level: an exact zero stays zero
_MOST = 1.0
_LEAST = 2.0**-6  # of a range: a range of nothing would have no scale


@final
@dataclass(frozen=True)
class Options:
    """How long and how far the signs are followed.

    Attributes:
        preset: `light` (50 iterations at rate 0.005), `default` (200) or `best` (1000, twice the rate up to 3 bits).
        iterations: steps per block; None: the preset's.
        batch: windows per step.
        lr: first step of the rounding, in steps of the grid; falls linearly to 0. None: the preset's, 1 / iterations.
        minmax_lr: first step of the factors on each group's range; None: as `lr`.
    """

    preset: str = "default"
    iterations: int | None = None
    batch: int = 8
    lr: float | None = None
    minmax_lr: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in _PRESETS:
            raise ValueError(f"preset {self.preset!r} is none of {', '.join(_PRESETS)}")
        if self.steps < 0 or self.batch < 1 or min(self.lr or 0, self.minmax_lr or 0) < 0:
            raise ValueError("iterations, lr and minmax_lr must be 0 or more, batch 1 or more")

    @property
    def steps(self) -> int:
        """Iterations, from the preset where they are not given."""
        return _PRESETS[self.preset] if self.iterations is None else self.iterations

    def rates(self, bits: int) -> tuple[float, float]:
        """First steps of the rounding and of the ranges."""
        rate = 0.005 if self.preset == "light" else 1 / max(self.steps, 1)
        if self.steps >= 1000 and bits <= 3:
            rate *= 2
        rate = rate if self.lr is None else self.lr
        return rate, rate if self.minmax_lr is None else self.minmax_lr


_PRESETS = {"light": 50, "default": 200, "best": 1000}


@final
class _SignRound:
    """Shifts `V` and range factors of one weight (arXiv:2309.05516, equations 3 and 4), moved by signs."""

    def __init__(self, weight: Tensor, scheme: Scheme, options: Options) -> None:
        self.source: Grouped = grouped(weight, scheme)
        rate, range_rate = options.rates(scheme.grid.bits)
        self.rates = (rate, 0.0 if scheme.scale in _FROZEN else range_rate)
        self.shift = torch.zeros_like(self.source.values)
        self.factors = [torch.ones_like(self.source.low) for _ in range(2)]
        self.affine = self.source.fit(self.source.low, self.source.high)

    @property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """The range that the factors scale: it holds 0, unless the zero point is free."""
        low, high = self.source.low, self.source.high
        return (low, high) if self.source.scheme.zero == "float" else (low.clamp(max=0), high.clamp(min=0))

    def _range(self) -> tuple[Tensor, Tensor]:
        low, high = (end * factor for end, factor in zip(self._ends, self.factors, strict=True))
        return low, high

    def _chunks(self) -> list[slice]:
        groups, width = self.shift.shape
        size = max(CHUNK // max(width, 1), 1)
        return [slice(start, start + size) for start in range(0, groups, size)]

    def _parts(self, at: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        zeros = None if self.affine.zeros is None else self.affine.zeros[at]
        return self.source.values[at], self.shift[at], self.affine.scales[at] * self.affine.unit, zeros

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The quantized groups, computed in float32, rounded once."""
        out = torch.empty(self.shift.shape, dtype=dtype)
        for at in self._chunks():
            weight, shift, scales, zeros = self._parts(at)
            torch.mul(rounded(weight, shift, scales, zeros, self.source.scheme).level, scales, out=out[at])
        return out

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The quantized weight, `[rows, cols]`."""
        return self.source.join(self.decoded(dtype))

    def step(self, grad: Tensor, progress: float) -> None:
        """One step of signed gradient descent on the shifts and the factors."""
        groups = self.source.split(grad)
        rate, range_rate = (rate * (1 - progress) for rate in self.rates)
        slopes = [self._move(groups[at], at, rate) for at in self._chunks()]
        for factor, end, parts in zip(self.factors, self._ends, zip(*slopes, strict=True), strict=True):
            toward = torch.cat(parts).sign_()
            factor.sub_(toward if self.affine.zeros is None else toward * end.sign(), alpha=range_rate)
            factor.clamp_(_LEAST, _MOST)
        self.affine = self.source.fit(*self._range())

    def _move(self, grad: Tensor, at: slice, rate: float) -> tuple[Tensor, Tensor]:
        weight, shift, scales, zeros = self._parts(at)
        now = rounded(weight, shift, scales, zeros, self.source.scheme)
        low = None if zeros is None else self._range()[0][at]
        slopes = range_slopes(grad, now, scales, low, 2.0**self.source.scheme.grid.bits - 1)
        shift.sub_((grad * now.inside).sign_(), alpha=rate).clamp_(-_REACH, _REACH)
        return slopes

    def result(self) -> QTensor:
        """The weight as it is stored: the very codes that the loss saw."""
        return self.source.store(self.decoded(torch.float32), self.affine)


def learn(block: Block, options: Options) -> Mapping[str, QTensor]:
    """Learned rounding of all weights of a block together, or round-to-nearest where that has the lower loss.

    Raises:
        WeightError: NaN or Inf in a weight, with its place.
    """
    learners = {name: _SignRound(weight, block.schemes[name], options) for name, weight in block.weights.items()}
    start = {name: learner.result() for name, learner in learners.items()}
    descend(block, learners, options.steps, options.batch)
    end = {name: learner.result() for name, learner in learners.items()}
    return best_of(block, [start, end], options.batch)


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: Options) -> QTensor:
    """Round to nearest: what weights outside of blocks get.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    ranges = finite_range(weight, stats, scheme)
    return finish(weight, fit(ranges, scheme, global_divisor(ranges, stats, scheme)), scheme)


def _objection(scheme: Scheme) -> str | None:
    if scheme.block.flat or scheme.block.rows != 1:
        return "it learns a range for every group within a row; use a scheme with -gN or -row"
    return None


METHOD = Method(
    about="SignRound: rounding and ranges learned from the block's output, 200 signed steps",
    quantize=quantize,
    options=Options,
    workspace=4.0,
    supports=_objection,
    learn=learn,
)
