"""GPTQ: round column by column, each with the errors of those before. See `docs/methods/gptq.md`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from lowbit.methods import Method, Stats, _gptq
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor


@final
@dataclass(frozen=True)
class Options:
    """The loop, its order, and how scales are chosen.

    Attributes:
        damp: added to the diagonal of the second moment, as a share of its mean; ten times as much until it factors.
        block: columns between two matrix products.
        order: of rounding: `static` (largest inputs first, blocks as they are), `none` (from left to right), `group`
            (largest first, blocks formed in that order; stores an index), `aware` (whole blocks, and columns in them).
        scales: `mse` (searched for the least error, weighted by the inputs) or `range` (cover the weights).
        fresh: choose a block's scale when its first column is reached, from the compensated weight (not in `static`).
        passes: of coordinate descent over codes after the first pass.
        refit: let these passes move scales and zero points as well.
        signed: whether searched scales of symmetric integers may be negative, as in `autoround`.
    """

    damp: float = 0.01
    block: int = 128
    order: Literal["static", "none", "group", "aware"] = "static"
    scales: Literal["mse", "range"] = "mse"
    fresh: bool = True
    passes: int = 4
    refit: bool = True
    signed: bool = True

    def __post_init__(self) -> None:
        if self.damp <= 0 or self.block < 1 or self.passes < 0:
            raise ValueError("damp must be above 0, block 1 or more, passes 0 or more")


def _loop(options: Options) -> _gptq.Loop:
    given = asdict(options)
    return _gptq.Loop(search=given.pop("scales") == "mse", **given)


def prepare(stats: Stats, scheme: Scheme, options: Options) -> Stats:
    """Factor the second moment; adds `damp`, the share of the mean diagonal that was needed."""
    return _gptq.prepare(stats, scheme, _loop(options))


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: Options) -> QTensor:
    """Round under what `prepare` made of the second moment.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    return _gptq.quantize(weight, stats, scheme, _loop(options))


METHOD = Method(
    about="GPTQ: round column by column, each with the errors of those before",
    quantize=quantize,
    options=Options,
    beside="gptq",
    needs=frozenset({"second_moment"}),
    workspace=40.0,
    prepared=_gptq.prepared_bytes,
    work=lambda rows, cols, scheme: _gptq.operations(rows, cols, Options().passes, scheme),
    supports=_gptq.objection,
    prepare=prepare,
    anywhere=True,
    tables=True,
    act_order=lambda options: bool(options.order == "group"),
)
