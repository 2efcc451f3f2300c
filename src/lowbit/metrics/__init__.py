"""Metrics: each file turns next-token distributions into values per token, and those into scores with intervals.

A metric is a frozen record of pure functions, `METRIC = Metric(...)`. It knows nothing of models or checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtyping import Float64, Int64
from torch import Tensor

from lowbit.metrics._blocks import Blocks, Score, Values

__all__ = ["Blocks", "LogProbs", "Metric", "Score", "Values"]

LogProbs = Float64[Tensor, "tokens vocab"]


@dataclass(frozen=True)
class Metric:
    """One way to score a model's next-token distributions, alone or against a reference's on the same tokens.

    Attributes:
        about: one line for the documentation.
        score: `(model, reference, targets) -> {name: value of each token}`. Log-probabilities in nats, float64; the
            reference is None where there is none. Called on a few tokens at a time.
        summarise: `(values, blocks) -> {name: Score}`. `values` holds what `score` gave for all tokens, in text order.
        needs_reference: whether the metric is left out where there is no reference.
    """

    about: str
    score: Callable[[LogProbs, LogProbs | None, Int64[Tensor, "tokens"]], dict[str, Float64[Tensor, "tokens"]]]
    summarise: Callable[[Mapping[str, Values], Blocks], dict[str, Score]]
    needs_reference: bool = False
