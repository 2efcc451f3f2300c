"""Perplexity: exp of the mean negative log-likelihood of the next token; against a reference, the change of its log."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, inf

from jaxtyping import Float64, Int64
from torch import Tensor

from lowbit.metrics import Blocks, LogProbs, Metric, Score, Values


def _score(
    model: LogProbs, reference: LogProbs | None, targets: Int64[Tensor, "tokens"]
) -> dict[str, Float64[Tensor, "tokens"]]:
    found = {"nll": model, "reference_nll": reference}
    return {
        name: -values.gather(1, targets[:, None]).squeeze(1) for name, values in found.items() if values is not None
    }


def _perplexity(nll: Score) -> Score:
    """The exponential of a score and of its ends: percentile intervals keep their meaning under a monotone function."""
    value, low, high = (None if part is None else _exp(part) for part in (nll.value, nll.low, nll.high))
    assert value is not None
    return Score(value, low, high)


def _exp(value: float) -> float:
    try:
        return exp(value)
    except OverflowError:  # of a destroyed model
        return inf


def _summarise(values: Mapping[str, Values], blocks: Blocks) -> dict[str, Score]:
    scores = {"perplexity": _perplexity(blocks.mean(values["nll"]))}
    if "reference_nll" in values:
        scores["reference_perplexity"] = _perplexity(blocks.mean(values["reference_nll"]))
        scores["log_perplexity_change"] = blocks.change(values["nll"] - values["reference_nll"])
    return scores


METRIC = Metric(
    "exp of the mean negative log-likelihood per token, and the paired change of its log", _score, _summarise
)
