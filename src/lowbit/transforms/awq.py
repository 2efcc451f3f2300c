"""Activation-aware scales: channels with large inputs get a finer grid. See `docs/methods/awq.md`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit import native
from lowbit.blocks import Block, Site
from lowbit.methods import Stats
from lowbit.schemes import Scheme
from lowbit.tensors import block_size
from lowbit.transforms import Transform
from lowbit.transforms._search import Factors, balanced, choose, floored, tokens_tried


@final
@dataclass(frozen=True)
class Options:
    """What is searched.

    Attributes:
        ratios: exponents tried, evenly spaced up to 1.
        duo: also try factors that divide by the size of the weights.
        windows: calibration windows by which candidates are judged, a longer one than 512 tokens for several; as many
            others confirm the choice.
    """

    ratios: int = 20
    duo: bool = True
    windows: int = 16

    def __post_init__(self) -> None:
        if self.ratios < 1 or self.windows < 1:
            raise ValueError("ratios and windows must be 1 or more")


def search(site: Site, block: Block, stats: Stats, options: Options) -> Factors | None:
    """The factors with the least error of the block's output, or None where none helps."""
    inputs = stats["mean_abs"].float()
    weights = any(block.weights[name].any() for name in site.weights)  # layers that were added may be 0
    if not inputs.isfinite().all() or not inputs.any() or not weights:
        return None
    return choose(site, block, _candidates(site, block, floored(inputs), options), options.windows)


def _candidates(site: Site, block: Block, inputs: Factors, options: Options) -> Iterator[Factors]:
    """`x**r` (Lin et al., arXiv:2306.00978, section 3.2), and `x**r / w**(1 - r)` as in the authors' later code."""
    powers = [i / options.ratios for i in range(1, options.ratios + 1)]
    yield from (balanced(inputs**power) for power in powers)
    if options.duo:
        sizes = floored(_weight_sizes(site, block))
        yield from (balanced(inputs**power / sizes ** (1 - power)) for power in [0.0, *powers[:-1]])


def _weight_sizes(site: Site, block: Block) -> Factors:
    """Mean over all rows that read a channel of its weights' magnitudes, each relative to the largest of its block."""
    total, rows = torch.zeros(site.channels), 0
    for name in site.weights:
        total += _relative(block.weights[name], block.schemes[name]).sum(0)
        rows += len(block.weights[name])
    return total / max(rows, 1)


def _relative(weight: Float[Tensor, "rows cols"], scheme: Scheme) -> Float[Tensor, "rows cols"]:
    flat = scheme.block.flat
    high, wide = (1, scheme.block.cols) if flat else block_size(tuple(weight.shape), scheme.block)
    low, top, _ = native.block_range(weight, high, wide)
    largest = torch.maximum(-low, top).clamp_(min=torch.finfo(torch.float32).tiny)
    row, col = (torch.arange(size) // step for size, step in zip(weight.shape, (high, wide), strict=True))
    return weight.abs() / largest[row][:, col]


TRANSFORM = Transform(
    about="activation-aware scales: channels with large inputs are quantized finer",
    search=search,
    options=Options,
    needs=frozenset({"mean_abs"}),
    method="clip",
    tokens=lambda options, length: tokens_tried(options.windows, length, options.ratios * (2 if options.duo else 1)),
)
