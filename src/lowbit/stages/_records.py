"""What a run leaves behind: plain facts, from which the report is made. No decision and no wording lives here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

Treatment = Literal[
    "skipped", "kept", "padded", "fallback", "tied", "left out", "apart", "quantized again", "otherwise in llama.cpp"
]  # fmt: skip


@final
@dataclass(frozen=True)
class Machine:
    """Where the run took place; `memory` in bytes."""

    cpu: str
    cores: int
    memory: int
    system: str
    python: str
    torch: str


@final
@dataclass(frozen=True)
class Source:
    """The float checkpoint: its path, bytes of its weights, number of weights, and their (most frequent) dtype."""

    path: str
    bytes: int
    parameters: int
    dtype: str


@final
@dataclass(frozen=True)
class Result:
    """What was written: path, format, bytes of its weights, mean bits of the quantized weights and of all weights."""

    path: str
    format: str
    bytes: int
    bits_quantized: float
    bits_all: float


@final
@dataclass(frozen=True)
class Outcome:
    """How one quantized weight came out.

    Attributes:
        method: the method that made it; differs from the planned one after a fallback.
        error: relative squared error, sum (w - w^)^2 / sum w^2.
        largest: largest absolute deviation of an element.
        seconds: time of one worker.
        against_rtn: the method's own objective over that of round-to-nearest (below 1: better); None if not scored.
    """

    method: str
    error: float
    largest: float
    seconds: float
    against_rtn: float | None = None


@final
@dataclass(frozen=True)
class Row:
    """One weight of the plan, and its outcome where it was quantized (`scheme` set)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str | None
    method: str | None
    reason: str
    before: int
    after: int
    outcome: Outcome | None = None


@final
@dataclass(frozen=True)
class Histogram:
    """Where a tensor's float weights lie between the levels of its grid.

    Attributes:
        name: the tensor.
        edges: borders of the bins, ascending, in `unit`; one more than `counts`.
        counts: float weights in each bin.
        levels: values of the grid, ascending, in `unit`.
        codes: stored weights at each level.
        unit: what one step of the axis means.
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    levels: tuple[float, ...]
    codes: tuple[int, ...]
    unit: str = "weight ÷ scale"


@final
@dataclass(frozen=True)
class Memory:
    """Anonymous memory in bytes: the peak seen, the largest of the estimates that were told, the limit (None: none)."""

    peak: int
    estimate: int
    limit: int | None = None


@final
@dataclass(frozen=True)
class Verification:
    """Weights read back and compared, those that differed, and the seconds it took: of workers, their share of them."""

    tensors: int
    mismatches: int
    seconds: float


@final
@dataclass(frozen=True)
class Count:
    """How many weights were treated in some way other than planned quantization, and why."""

    kind: Treatment
    reason: str
    tensors: int


@final
@dataclass(frozen=True)
class Starved:
    """An expert to which the router sent fewer tokens of the calibration text than it has inputs.

    Attributes:
        block: and the list of experts in it, as `model.layers.0.mlp`.
        expert: its number.
        tokens: how many it saw.
    """

    block: str
    expert: int
    tokens: int


@final
@dataclass(frozen=True)
class TermsRecord:
    """The low-rank terms beside the weights: their adapter, its bytes, those as bits per quantized weight, the ranks.

    `ranks` is by name of the weight; those that got no term are absent.
    """

    path: str
    bytes: int
    bits: float
    ranks: Mapping[str, int]


@final
@dataclass(frozen=True)
class RunRecord:
    """Everything the report says, and nothing else.

    Attributes:
        command: the command line, quoted for a shell.
        created: ISO 8601 time with its zone.
        rows: every weight in the order of the plan.
        histograms: the worst tensors, worst first.
        seconds: seconds of each stage, in order.
        verified: None where nothing was compared.
        evaluation: `Evaluation.to_dict()` of `stages/evaluate.py`; None where nothing was evaluated.
        resumed: weights taken over from an interrupted run of the same command.
        calibration: what was learned from: `Samples.to_dict()`, `recipe`, `dtype`, `likeness` to the evaluation text
            (`Similarity`); None where nothing was.
        adapter: None where no low-rank terms were made.
        decided: what was said while schemes were chosen for a budget: plans that were measured, what was predicted.
        unscored: why an evaluation that was asked for has no scores.
        recipe: the steps of the method, as `rotate+rtn`.
        starved: experts that saw few tokens of the calibration text, by block and number.
        warnings: sentences that the user was told before the work began.
    """

    command: str
    lowbit: str
    created: str
    machine: Machine
    source: Source
    result: Result
    rows: tuple[Row, ...]
    seconds: Mapping[str, float]
    memory: Memory
    verified: Verification | None = None
    evaluation: Mapping[str, Any] | None = None
    histograms: tuple[Histogram, ...] = ()
    counts: tuple[Count, ...] = field(default=())
    resumed: int = 0
    calibration: Mapping[str, Any] | None = None
    adapter: TermsRecord | None = None
    decided: tuple[str, ...] = ()
    unscored: str | None = None
    recipe: str = ""
    starved: tuple[Starved, ...] = ()
    warnings: tuple[str, ...] = ()
