"""Smoothing: outliers of activations moved into the weights that read them. See `docs/methods/smoothquant.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from lowbit.blocks import Block, Site
from lowbit.methods import Stats
from lowbit.transforms import Transform
from lowbit.transforms._search import Factors, balanced, choose, floored


@final
@dataclass(frozen=True)
class Options:
    """What is searched.

    Attributes:
        strengths: values of alpha tried, evenly spaced from 0 to 1, both included.
        windows: calibration windows by which candidates are judged; as many others confirm the choice.
    """

    strengths: int = 21
    windows: int = 16

    def __post_init__(self) -> None:
        if self.strengths < 2 or self.windows < 1:
            raise ValueError("strengths must be 2 or more, windows 1 or more")


def search(site: Site, block: Block, stats: Stats, options: Options) -> Factors | None:
    """`x**a / w**(1 - a)` (Xiao et al., arXiv:2211.10438, equation 4) for the a with the least error of the output.

    x and w are the greatest magnitudes of a channel among the inputs and the weights that read it. None where no a
    is better than no smoothing.
    """
    inputs = stats["absmax"].float()
    weights = torch.stack([block.weights[name].abs().amax(0) for name in site.weights]).amax(0)
    if not (inputs.isfinite().all() and inputs.any() and weights.any()):
        return None
    x, w = floored(inputs), floored(weights)
    powers = (i / (options.strengths - 1) for i in range(options.strengths))
    return choose(site, block, (balanced(x**a / w ** (1 - a)) for a in powers), options.windows)


TRANSFORM = Transform(
    about="outliers of activations moved into the weights, for activations that are quantized too",
    search=search,
    options=Options,
    needs=frozenset({"absmax"}),
    # Besides the candidates: no factors, and on other windows no factors and the best.
    windows=lambda options: options.windows * (options.strengths + 3),
)
