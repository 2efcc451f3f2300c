"""Round to nearest: scales from the range of each block, each weight to the nearest code. See `docs/methods/rtn.md`."""

from __future__ import annotations

from jaxtyping import Float, UInt8
from torch import Tensor

from lowbit.methods import Method, NoOptions, Stats
from lowbit.methods._scales import nearest, unscaled
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor


def quantize(
    weight: Float[Tensor, "rows cols"],
    stats: Stats,
    scheme: Scheme,
    options: NoOptions,
    out: UInt8[Tensor, "rows cols"] | None = None,
) -> QTensor:
    """What `_scales.nearest` makes of the weight.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    return nearest(weight, stats, scheme, out)


METHOD = Method(
    about="round to nearest: no search, no data, fastest",
    quantize=quantize,
    workspace=4.0,
    supports=unscaled,
    into=quantize,
)
