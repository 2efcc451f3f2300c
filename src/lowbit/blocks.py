"""A block of a model as methods and transforms see it: float weights, schemes, and windows that can be run through it.

Plain data and functions: what makes them (a `transformers` module, filled from a checkpoint) is in `stages/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lowbit.schemes import Scheme

Weights = Mapping[str, Tensor]
CPU = torch.device("cpu")


@final
@dataclass(frozen=True)
class Site:
    """Weights that read one and the same input.

    Attributes:
        weights: names, in the order in which the block uses them.
        channels: width of the input: columns of each of these weights.
        made_of: for each channel what it is made of; channels of one origin take one factor. None: each its own.
    """

    weights: tuple[str, ...]
    channels: int
    made_of: Int64[Tensor, "channels"] | None = None

    def tied(self, factors: Float[Tensor, "channels"]) -> Float[Tensor, "channels"]:
        """Factors with the geometric mean of each origin's channels in the place of all of them."""
        if self.made_of is None:
            return factors
        sums = torch.zeros(int(self.made_of.max()) + 1).index_add_(0, self.made_of, factors.log())
        return (sums / self.made_of.bincount()).exp()[self.made_of]


@final
@dataclass(frozen=True)
class Block:
    """One block, its calibration windows, and what it should compute.

    Attributes:
        weights: the weights to quantize, float32, `[outputs, inputs]`, in the order of use.
        schemes: how each is stored.
        activations: how the input of each is quantized when the model runs; absent where it is not.
        windows: number of calibration windows.
        run: `(indices, weights, factors={}) -> output`: the block's output for these windows, `[indices, tokens,
            width]`, float32 or bfloat16 as the block computes, with the given weights in the place of its own; inputs
            are what the quantized blocks before produce. Inputs of the weights named in `activations` are quantized
            as it says, and where `factors` has the weight (`[inputs]`, float32), divided by these before and multiplied
            after, as if they were folded. Differentiable with respect to the given weights and factors.
        target: `indices -> output`: what the float model computes there.
        nearest: `(name, weight) -> weight`: round-to-nearest under the scheme of `name`, and back to float32.
        importance: for each weight the mean square of its inputs; absent where it is not known.
        seed: of every choice at random.
        threads: in how many `run` may be called at once.
        pool: of so many, where there is one.
        device: where it runs; weights given to `run` may be there or not, what is given here is on the processor
            but for `information`.
        information: Fisher information at the output, symmetric and positive, one on average along its diagonal; None
            where errors of all channels count alike.
    """

    weights: Weights
    schemes: Mapping[str, Scheme]
    windows: int
    run: Callable[..., Tensor]
    target: Callable[[Sequence[int]], Tensor]
    nearest: Callable[[str, Float[Tensor, "rows cols"]], Float[Tensor, "rows cols"]]
    activations: Mapping[str, Scheme] = field(default_factory=dict)
    importance: Mapping[str, Float[Tensor, "inputs"]] = field(default_factory=dict)
    seed: int = 0
    threads: int = 1
    pool: Executor | None = None
    device: torch.device = CPU
    information: Float[Tensor, "width width"] | None = None

    def weighed(self, error: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Half the derivative of the loss by an error of the output: `e F`, or `e`."""
        return error if self.information is None else error @ self.information.to(error)

    def loss(self, error: Float[Tensor, "*tokens width"]) -> float:
        """What an error of the output costs: the sum over tokens of `e^T F e`, or of `e^T e`."""
        return float((error * self.weighed(error)).sum(dtype=torch.float64))
