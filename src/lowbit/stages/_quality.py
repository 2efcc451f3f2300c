"""The evaluation as the report reads it: values with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, final


@final
@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def worst(self) -> float:
        """The upper end, or the value itself without an interval; infinite where any part is not a number."""
        parts = (self.value, self.value if self.high is None else self.high)
        return max(parts) if all(map(isfinite, parts)) else inf


@final
@dataclass(frozen=True)
class Quality:
    """What was measured; everything from `reference` on is None where nothing was compared.

    Attributes:
        text: name of the text; `tokens`: how many of its tokens were predicted and scored.
        perplexity: of the result; `reference`: of the original.
        divergence: mean KL divergence from the original, nats per token; `median` and `p99`: of single tokens.
        agreement: share of tokens for which both find the same next token most likely.
        change: mean change of the log-perplexity, paired; `p_value`: of "no change".
    """

    text: str
    tokens: int
    perplexity: Interval
    reference: Interval | None
    divergence: Interval | None
    median: Interval | None
    p99: Interval | None
    agreement: Interval | None
    change: Interval | None
    p_value: float | None

    @property
    def finite(self) -> bool:
        """Whether every mean is a number: a destroyed model gives NaN or infinite ones."""
        means = (self.perplexity, self.reference, self.divergence, self.change)
        return all(isfinite(mean.value) for mean in means if mean)


def read_quality(evaluation: Mapping[str, Any] | None) -> Quality | None:
    """The parts of `Evaluation.to_dict()` on which the verdict rests; None where nothing was evaluated."""
    if evaluation is None:
        return None
    scores: Mapping[str, Mapping[str, Any]] = evaluation["scores"]
    found = {name: _interval(score) for name, score in scores.items()}
    return Quality(
        text=evaluation["conditions"]["text"],
        tokens=evaluation["conditions"]["scored"],
        perplexity=found["perplexity"],
        reference=found.get("reference_perplexity"),
        divergence=found.get("kl_mean"),
        median=found.get("kl_median"),
        p99=found.get("kl_p99"),
        agreement=found.get("top1_agreement"),
        change=found.get("log_perplexity_change"),
        p_value=scores.get("log_perplexity_change", {}).get("p_value"),
    )


def _interval(score: Mapping[str, Any]) -> Interval:
    value = score["value"]
    return Interval(inf if value is None else value, score.get("low"), score.get("high"))
