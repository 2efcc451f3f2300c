"""What the transforms that search have in common: the error of a block's output under candidate factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit.blocks import Block, Site, Weights

Factors = Float[Tensor, "channels"]

_BATCH = 4  # windows per run: enough rows for fast products, few enough that activations stay small beside weights
_WINDOW = 512  # tokens of a window that counts as one where candidates are judged
_LEAST = 1e-4  # of the largest: a channel that is nearly never used pulls no other factor


def spread(block: Block, count: int) -> tuple[list[int], list[int]]:
    """Two disjoint, evenly spread sets of up to `count` windows: one to choose by, one to confirm the choice.

    The second is empty where the block has one window.
    """
    total = min(2 * count, block.windows)
    chosen = [i * block.windows // total for i in range(total)]
    return chosen[::2], chosen[1::2]


def judging(windows: int, length: int) -> int:
    """How many windows of `length` tokens judge where `windows` were asked for: longer ones are several."""
    return max(windows * _WINDOW // max(length, _WINDOW), 1)


def rounded(site: Site, block: Block, factors: Factors) -> dict[str, Tensor]:
    """The site's weights times the factors, quantized, and divided by them again: what they mean to the old input."""
    return {name: block.nearest(name, block.weights[name] * factors).div_(factors) for name in site.weights}


@torch.no_grad()
def output_error(block: Block, indices: Sequence[int], weights: Weights, factors: Weights) -> float:
    """Mean squared difference between the block's output with these weights and what the float model computes."""
    error, count = 0.0, 0
    for start in range(0, len(indices), _BATCH):
        batch = indices[start : start + _BATCH]
        # Factors matter where inputs are quantized, and only there has `run` a use for them.
        found = block.run(batch, weights, factors) if block.activations else block.run(batch, weights)
        difference = found.float() - block.target(batch).float()
        error += difference.square_().sum(dtype=torch.float64).item()
        count += difference.numel()
    return error / max(count, 1)


def choose(site: Site, block: Block, candidates: Iterable[Factors], windows: int) -> Factors | None:
    """The candidate with the least output error; None where it does not beat no factors, on other windows too."""
    search, confirm = spread(block, judging(windows, block.target([0]).shape[1]))

    def error_of(factors: Factors, indices: Sequence[int]) -> float:
        return output_error(block, indices, rounded(site, block, factors), dict.fromkeys(site.weights, factors))

    ones = torch.ones(site.channels)
    best, least = None, error_of(ones, search)
    for factors in map(site.tied, candidates):
        error = error_of(factors, search)
        if error < least:  # never so for NaN
            best, least = factors, error
    if best is not None and confirm and error_of(best, confirm) >= error_of(ones, confirm):
        return None
    return best


def smoothing(site: Site, block: Block, inputs: Factors, strengths: int) -> Iterator[Factors]:
    """`x**a / w**(1 - a)` (Xiao et al., arXiv:2211.10438, equation 4), a from 0 to 1; nothing for inputs of 0.

    x and w are the greatest magnitudes of a channel among the inputs and the weights that read it.
    """
    weights = torch.stack([block.weights[name].abs().amax(0) for name in site.weights]).amax(0)
    if inputs.isfinite().all() and inputs.any() and weights.any():
        x, w = floored(inputs), floored(weights)
        powers = (i / (strengths - 1) for i in range(strengths))
        yield from (balanced(x**a / w ** (1 - a)) for a in powers)


def balanced(factors: Factors) -> Factors:
    """Positive, finite factors scaled so that the largest and the least are each other's reciprocals."""
    factors = floored(factors)
    return factors / (factors.max() * factors.min()).sqrt()


def floored(sizes: Factors) -> Factors:
    """Magnitudes with those near 0 raised to a small share of the largest."""
    return sizes.clamp(min=_LEAST * sizes.max().item())
