"""Frontier: of points with a size, a divergence and perhaps a speed, which are worth having, and for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, final

# What users weigh: quality, size, speed. Printed with every recommendation.
USERS: Mapping[str, tuple[float, float, float]] = {
    "balanced": (0.4, 0.3, 0.3),
    "quality first": (0.7, 0.15, 0.15),
    "size first": (0.2, 0.6, 0.2),
    "speed first": (0.2, 0.2, 0.6),
}
_LEAST = 1e-9  # nats: below it divergences are not told apart, and a logarithm needs a number


@final
@dataclass(frozen=True)
class Interval:
    """A measured value with the limits of its 95% interval."""

    value: float
    low: float
    high: float


@final
@dataclass(frozen=True)
class Point:
    """One measured way to store a model.

    Attributes:
        name: of the point; `scheme`, `method`, `format`: what it is.
        bytes: of its weights; `bits` per quantized weight.
        divergence: mean KL divergence from the original, nats per token.
        change: mean change of log-perplexity.
        agreement: share of tokens with the same most likely next one.
        seconds: that quantizing took.
        speed: tokens a second when decoding on this machine; None where it was not measured.
    """

    name: str
    scheme: str
    method: str
    format: str
    bytes: int
    bits: float
    divergence: Interval
    change: Interval
    agreement: Interval
    seconds: float
    speed: float | None = None


@final
@dataclass(frozen=True)
class Judged:
    """A point, what dominates it, and whether that is beyond the intervals."""

    point: Point
    dominated: str | None
    surely: bool


def judge(points: Sequence[Point]) -> list[Judged]:
    """Every point with the best of those that dominate it: no larger, no more divergent, and not the same in both.

    `surely`: a dominating point's interval of divergence ends below the point's begin.
    """
    found = []
    for point in points:
        better = [other for other in points if _dominates(other, point)]
        best = min(better, key=lambda other: (other.divergence.value, other.bytes), default=None)
        surely = any(other.divergence.high < point.divergence.low for other in better)
        found.append(Judged(point, best.name if best else None, surely))
    return found


def _dominates(one: Point, other: Point) -> bool:
    mine, its = (one.bytes, one.divergence.value), (other.bytes, other.divergence.value)
    return mine != its and mine[0] <= its[0] and mine[1] <= its[1]


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that none dominates, the smallest first."""
    return sorted((each.point for each in judge(points) if not each.dominated), key=lambda point: point.bytes)


def knee(points: Sequence[Point]) -> Point | None:
    """Where the frontier bends most: farthest below the line between its ends, both axes logarithms scaled to 0..1.

    None where fewer than three points are on it, or none is below that line (Satopaa et al., "Kneedle", 2011).
    """
    line = frontier(points)
    if len(line) < 3:
        return None
    sizes, losses = [log(point.bytes) for point in line], [_log(point) for point in line]
    wide, high = sizes[-1] - sizes[0], losses[0] - losses[-1]
    below = [
        1 - (size - sizes[0]) / wide - (loss - losses[-1]) / high for size, loss in zip(sizes, losses, strict=True)
    ]
    best = max(range(len(line)), key=lambda at: below[at])
    return line[best] if below[best] > 1e-6 else None


def _log(point: Point) -> float:
    return log(max(point.divergence.value, _LEAST))


def recommend(points: Sequence[Point]) -> dict[str, Point]:
    """For each kind of user the point whose largest weighted shortfall is the least.

    A shortfall is 1 less a score (`scores`): the weighted Chebyshev distance from the ideal (Bowman, 1976), which finds
    points between the ends of a frontier too, where a weighted sum only finds ends. Where speed was not measured its
    weight counts for the size. A point that another dominates in size and quality counts too where it was measured to
    be faster (`worth`).
    """
    kept = worth(points)
    marks = scores(kept)

    def shortfall(point: Point, weights: Sequence[float]) -> tuple[float, float]:
        short = [weight * (1 - mark) for weight, mark in zip(weights, marks[point.name], strict=True)]
        return max(short), sum(short)

    timed = all(point.speed for point in kept)
    return {
        user: min(kept, key=lambda point: shortfall(point, weights if timed else untimed(weights)))
        for user, weights in USERS.items()
        if kept
    }


def untimed(weights: tuple[float, float, float]) -> tuple[float, float, float]:
    """Weights where speed was not measured: the fewer bytes, the faster."""
    return weights[0], weights[1] + weights[2], 0.0


def worth(points: Sequence[Point]) -> list[Point]:
    """The frontier, and what is faster than all that dominate it."""
    return [
        point
        for point in points
        if all((other.speed or 0) < (point.speed or 0) for other in points if _dominates(other, point))
    ]


def scores(points: Sequence[Point]) -> dict[str, tuple[float, float, float]]:
    """Quality, size and speed of every point, each from 0 (the worst of these points) to 1 (the best), by logarithms.

    Without a measured speed of all, that of the size stands in for it.
    """
    timed = all(point.speed for point in points)
    quality = _scaled([-_log(point) for point in points])
    size = _scaled([-log(point.bytes) for point in points])
    speed = _scaled([log(point.speed or 1) for point in points]) if timed else size
    return {point.name: each for point, each in zip(points, zip(quality, size, speed, strict=True), strict=True)}


def _scaled(values: Sequence[float]) -> list[float]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return [(value - low) / (high - low) if high > low else 1.0 for value in values]


def read_point(data: Mapping[str, Any]) -> Point:
    """A point from its JSON object; raises `KeyError` or `TypeError` where it is none."""
    parts = {name: Interval(**data[name]) for name in ("divergence", "change", "agreement")}
    return Point(**{**data, **parts})
