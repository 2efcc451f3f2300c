"""Top-1 agreement: how often the model's most likely next token is the reference's."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float64, Int64
from torch import Tensor

from lowbit.metrics import Blocks, LogProbs, Metric, Score, Values


def _score(
    model: LogProbs, reference: LogProbs | None, targets: Int64[Tensor, "tokens"]
) -> dict[str, Float64[Tensor, "tokens"]]:
    assert reference is not None
    return {"agreement": (model.argmax(1) == reference.argmax(1)).double()}


def _summarise(values: Mapping[str, Values], blocks: Blocks) -> dict[str, Score]:
    return {"top1_agreement": blocks.mean(values["agreement"])}


METRIC = Metric("share of positions where both models find the same token most likely", _score, _summarise, True)
