"""LDLQ: QuIP's adaptive rounding, the bare first pass of the loop. See `docs/methods/ldlq.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from lowbit.methods import Method, Stats, _gptq
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor


@final
@dataclass(frozen=True)
class Options:
    """QuIP's own, as far as they concern rounding.

    Attributes:
        damp: added to the diagonal of the second moment, as a share of its mean; ten times as much until it factors.
    """

    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.damp <= 0:
            raise ValueError("damp must be above 0")


def _loop(options: Options) -> _gptq.Loop:
    return _gptq.Loop(options.damp, 128, "none", search=False, fresh=False, passes=0, refit=False, signed=False)


def prepare(stats: Stats, scheme: Scheme, options: Options) -> Stats:
    """Factor the second moment; adds `damp`, the share of the mean diagonal that was needed."""
    return _gptq.prepare(stats, scheme, _loop(options))


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: Options) -> QTensor:
    """Round under what `prepare` made of the second moment, with round-to-nearest's scales.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    return _gptq.quantize(weight, stats, scheme, _loop(options))


METHOD = Method(
    about="LDLQ: QuIP's rounding with linear feedback, from left to right",
    quantize=quantize,
    options=Options,
    beside="ldlq",
    needs=frozenset({"second_moment"}),
    workspace=40.0,
    supports=_gptq.objection,
    prepare=prepare,
    anywhere=True,
    tables=True,
    prepared=_gptq.prepared_bytes,
    work=lambda rows, cols, scheme: _gptq.operations(rows, cols, 0, scheme),
)
