"""Smoothing: outliers of activations moved into the weights that read them. See `docs/methods/smoothquant.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lowbit.blocks import Block, Site
from lowbit.methods import Stats
from lowbit.transforms import Transform
from lowbit.transforms._search import Factors, choose, smoothing, tokens_tried


@final
@dataclass(frozen=True)
class Options:
    """What is searched.

    Attributes:
        strengths: values of alpha tried, evenly spaced from 0 to 1, both included.
        windows: calibration windows by which candidates are judged, a longer one than 512 tokens for several; as many
            others confirm the choice.
    """

    strengths: int = 21
    windows: int = 16

    def __post_init__(self) -> None:
        if self.strengths < 2 or self.windows < 1:
            raise ValueError("strengths must be 2 or more, windows 1 or more")


def search(site: Site, block: Block, stats: Stats, options: Options) -> Factors | None:
    """The smoothing whose strength has the least error of the output; None where none is better than no smoothing."""
    candidates = list(smoothing(site, block, stats["absmax"].float(), options.strengths))
    return choose(site, block, candidates, options.windows) if candidates else None


TRANSFORM = Transform(
    about="outliers of activations moved into the weights, for activations that are quantized too",
    search=search,
    options=Options,
    needs=frozenset({"absmax"}),
    tokens=lambda options, length: tokens_tried(options.windows, length, options.strengths),
)
