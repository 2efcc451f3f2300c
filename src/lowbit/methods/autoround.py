"""SignRound: rounding and ranges learned by signed gradients, block by block. See `docs/methods/autoround.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.blocks import CPU, Block
from lowbit.methods import Learned, Method, Stats, _blocks
from lowbit.methods._ggml import encode
from lowbit.methods._learn import grouped, learned, range_slopes, rounded, within_rows
from lowbit.methods._scales import nearest
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor

_REACH = 0.5 - 2.0**-12  # a weight that is a level stays this level: an exact zero stays zero
_LEAST, _MOST = 2.0**-6, 2.0  # of a range: a range of nothing would have no scale


@final
@dataclass(frozen=True)
class Options:
    """How long and how far the signs are followed.

    Attributes:
        preset: `light` (50 iterations at 0.005), `default` (200) or `best` (1000, ranges at twice that up to 3 bits).
        iterations: steps per block; None: the preset's.
        batch: windows per step.
        lr: first step of the rounding, in steps of the grid; falls linearly to 0. None: the preset's, 2 / iterations,
            3 / iterations up to 3 bits.
        minmax_lr: first step of the factors on each group's range; None: the preset's, 1 / iterations.
        search: whether these factors start where rounded weights have the least squared error, instead of at 1.
            None: on tables and up to 3 bits. Never with zero points, where the ends of a range do not move apart.
        signed: whether scales of symmetric integers may be negative: the steps of the grid are then smaller by
            1 / 2**bits, as the level that has no counterpart is where a group's largest weight is.
        information: whether errors of a block's output count as much as they change the model's predictions; else all
            alike, as published. What it gains and what it costs: `docs/methods/autoround.md`.
    """

    preset: Literal["light", "default", "best"] = "default"
    iterations: int | None = None
    batch: int = 8
    lr: float | None = None
    minmax_lr: float | None = None
    search: bool | None = None
    signed: bool = True
    information: bool = False

    def __post_init__(self) -> None:
        if self.total < 0 or self.batch < 1 or min(self.lr or 0, self.minmax_lr or 0) < 0:
            raise ValueError("iterations, lr and minmax_lr must be 0 or more, batch 1 or more")

    @property
    def total(self) -> int:
        """Iterations, from the preset where they are not given."""
        return _PRESETS[self.preset] if self.iterations is None else self.iterations

    def searches(self, scheme: Scheme) -> bool:
        """Whether ranges are searched first."""
        coarse = scheme.grid.kind != "int" or scheme.grid.bits <= 3
        return scheme.zero == "none" and (coarse if self.search is None else self.search)

    def rates(self, bits: int) -> tuple[float, float]:
        """First steps of the rounding and of the ranges."""
        published = 0.005 if self.preset == "light" else 1 / max(self.total, 1)
        # Faster than published at any width: `docs/methods/autoround.md`.
        rounding = published if self.preset == "light" else (3 if bits <= 3 else 2) * published
        ranges = 2 * published if self.total >= 1000 and bits <= 3 else published
        return rounding if self.lr is None else self.lr, ranges if self.minmax_lr is None else self.minmax_lr


_PRESETS = {"light": 50, "default": 200, "best": 1000}


@final
class _SignRound:
    """Shifts `V` and range factors of one weight (arXiv:2309.05516, equations 3 and 4), moved by signs."""

    def __init__(
        self,
        weight: Tensor,
        scheme: Scheme,
        options: Options,
        device: torch.device = CPU,
        importance: Tensor | None = None,
    ) -> None:
        self._source = grouped(weight, scheme, options.signed, device, importance)
        self._top = 2.0**scheme.grid.bits - 1
        rate, range_rate = options.rates(scheme.grid.bits)
        still = scheme.scale == "e8m0" or self._source.fixed  # a power of two has no small step
        self._rates = (rate, 0.0 if still else range_rate)
        self._shift = torch.zeros_like(self._source.values)
        searched = options.searches(scheme) and not self._source.fixed
        factor = self._source.search() if searched else torch.ones_like(self._source.low)
        self._factors = [factor, factor.clone()]
        self._affine = self._source.fit(*self._factors)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The quantized weight, `[rows, cols]`."""
        return self._source.decode(self._shift, self._affine, dtype)

    def step(self, grad: Tensor, progress: float) -> None:
        """One step of signed gradient descent on the shifts and the factors."""
        groups, source = self._source.split(grad), self._source
        rate, range_rate = (rate * (1 - progress) for rate in self._rates)
        slopes = [self._move(groups[at], at, s, z, rate) for at, s, z in source.parts(self._affine)]
        for factor, end, parts in zip(self._factors, (source.low, source.high), zip(*slopes, strict=True), strict=True):
            toward = torch.cat(parts).sign_()
            factor.sub_(toward if self._affine.zeros is None else toward * end.sign(), alpha=range_rate)
            factor.clamp_(_LEAST, _MOST)
        self._affine = source.fit(*self._factors)

    def _move(
        self, grad: Tensor, at: slice, scales: Tensor, zeros: Tensor | None, rate: float
    ) -> tuple[Tensor, Tensor]:
        """The step of some groups' shifts; how the loss depends on the ends of their ranges."""
        now = rounded(self._source.values[at], self._shift[at], scales, zeros, self._source.scheme)
        low = None if zeros is None else self._source.low[at] * self._factors[0][at]
        grad = grad.float()
        kept = now.kept(grad)
        slopes = range_slopes(grad, kept, now, scales, low, self._top)
        self._shift[at].sub_(kept.sign_(), alpha=rate).clamp_(-_REACH, _REACH)
        return slopes

    def result(self) -> QTensor:
        """The weight as it is stored: the very codes that the loss saw."""
        return self._source.store(self._shift, self._affine)


def learn(block: Block, options: Options) -> Learned:
    """Learned rounding of all weights of a block together.

    Raises:
        WeightError: NaN or Inf in a weight, with its place.
    """

    def learner(name: str) -> _SignRound:
        weight, importance = block.weights[name], block.importance.get(name)
        return _SignRound(weight, block.schemes[name], options, block.device, importance)

    each = block.pool.map if block.pool else map  # a search of scales in super-blocks takes its time
    learners = dict(zip(block.weights, each(learner, block.weights), strict=True))
    return learned(block, learners, options.total, options.batch)


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: Options) -> QTensor:
    """Round to nearest, or in super-blocks the fitted encoder: what weights outside of blocks get.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    if _blocks.in_super_blocks(scheme):
        return encode(weight, None, scheme, None, fitted=True)
    return nearest(weight, stats, scheme)


def _objection(scheme: Scheme) -> str | None:
    return None if _blocks.in_super_blocks(scheme) else within_rows(scheme)


METHOD = Method(
    about="SignRound: rounding and ranges learned from the block's output, 200 signed steps",
    quantize=quantize,
    options=Options,
    beside="gptq",
    workspace=4.0,
    supports=_objection,
    learn=learn,
    windows=lambda options, windows: 3 * options.total * min(options.batch, windows),  # backward is twice as long
    batch=lambda options: options.batch,
    informed=lambda options: options.information,
)
