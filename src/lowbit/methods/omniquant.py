"""OmniQuant's learnable weight clipping: ranges learned from the block's output. See `docs/methods/omniquant.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.blocks import CPU, Block
from lowbit.methods import Learned, Method, Stats
from lowbit.methods._learn import grouped, learned, range_slopes, rounded, within_rows
from lowbit.methods._scales import nearest
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor

_START = 4.0  # sigmoid(4) = 0.982: close to the whole range, and not yet flat


@final
@dataclass(frozen=True)
class Options:
    """How long the clipping is learned.

    Attributes:
        epochs: passes over the calibration windows.
        batch: windows per step.
        lr: AdamW's rate for the logits of the clipping factors.
    """

    epochs: int = 20
    batch: int = 8
    lr: float = 0.01

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or self.lr < 0:
            raise ValueError("epochs and lr must be 0 or more, batch 1 or more")


@final
class _Clipping:
    """Logits of two factors on the range of each group of one weight (arXiv:2308.13137, equation 2)."""

    def __init__(self, weight: Tensor, scheme: Scheme, options: Options, device: torch.device = CPU) -> None:
        self._source = grouped(weight, scheme, device=device)
        self._top = 2.0**scheme.grid.bits - 1
        self._logits = torch.full((2, len(self._source.low), 1), _START, device=device)
        self._adam = torch.optim.AdamW([self._logits], lr=options.lr, weight_decay=0)
        self._affine = self._source.fit(*self._logits.sigmoid())

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The quantized weight, `[rows, cols]`."""
        return self._source.decode(None, self._affine, dtype)

    def step(self, grad: Tensor, progress: float) -> None:
        """One step of AdamW on the logits."""
        source, factors = self._source, self._logits.sigmoid()
        groups, has_zero = source.split(grad.float()), self._affine.zeros is not None
        low, slopes = source.low * factors[0], []
        for at, scales, zeros in source.parts(self._affine):
            now = rounded(source.values[at], None, scales, zeros, source.scheme)
            kept = now.kept(groups[at])
            ends = range_slopes(groups[at], kept, now, scales, low[at] if has_zero else None, self._top)
            slopes.append(torch.stack(ends))
        whole = torch.stack([source.low, source.high]) if has_zero else torch.ones_like(factors)
        self._logits.grad = torch.cat(slopes, 1) * whole * factors * (1 - factors)
        self._adam.step()
        self._affine = source.fit(*self._logits.sigmoid())

    def result(self) -> QTensor:
        """The weight as it is stored: the very codes that the loss saw."""
        return self._source.store(None, self._affine)


def learn(block: Block, options: Options) -> Learned:
    """Learned clipping of all weights of a block together.

    Raises:
        WeightError: NaN or Inf in a weight, with its place.
    """
    parts = ((name, weight, block.schemes[name]) for name, weight in block.weights.items())
    learners = {name: _Clipping(weight, scheme, options, block.device) for name, weight, scheme in parts}
    steps = options.epochs * max(block.windows // options.batch, 1)
    return learned(block, learners, steps, options.batch)


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: Options) -> QTensor:
    """Round to nearest: what weights outside of blocks get.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    return nearest(weight, stats, scheme)


def _objection(scheme: Scheme) -> str | None:
    if scheme.scale == "e8m0":
        return "it learns ranges in small steps, and a scale that is a power of two has none"
    return within_rows(scheme)


METHOD = Method(
    about="OmniQuant: clipping of each group learned from the block's output",
    quantize=quantize,
    options=Options,
    workspace=4.0,
    supports=_objection,
    learn=learn,
    windows=lambda options, windows: 3 * windows * options.epochs,  # backward is twice as long
    batch=lambda options: options.batch,
)
