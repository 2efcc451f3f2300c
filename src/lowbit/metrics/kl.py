"""KL divergence of the model from the reference, KL(reference || model), per token, in nats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from lowbit.metrics import Blocks, LogProbs, Metric, Score, Values


def _score(
    model: LogProbs, reference: LogProbs | None, targets: Int64[Tensor, "tokens"]
) -> dict[str, Float64[Tensor, "tokens"]]:
    assert reference is not None
    chance = reference.exp()
    # A token that the reference rules out adds nothing, also where both log-probabilities are minus infinity.
    terms = torch.where(chance > 0, chance * (reference - model), 0.0)
    return {"kl": terms.sum(1)}


def _summarise(values: Mapping[str, Values], blocks: Blocks) -> dict[str, Score]:
    median, high = np.quantile(values["kl"], [0.5, 0.99])
    return {"kl_mean": blocks.mean(values["kl"]), "kl_median": Score(float(median)), "kl_p99": Score(float(high))}


METRIC = Metric("KL(reference || model) per token in nats: mean, median, 99th percentile", _score, _summarise, True)
