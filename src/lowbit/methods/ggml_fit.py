"""llama.cpp's block types with less squared error than its own encoders leave. See `docs/methods/ggml_fit.md`."""

from __future__ import annotations

from jaxtyping import Float, UInt8
from torch import Tensor

from lowbit.methods import Method, NoOptions, Stats
from lowbit.methods._ggml import encode, without_importance
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor


def quantize(
    weight: Float[Tensor, "rows cols"],
    stats: Stats,
    scheme: Scheme,
    options: NoOptions,
    out: UInt8[Tensor, "rows cols"] | None = None,
) -> QTensor:
    """Scales, minima and codes of little squared error: less in a weight than `ggml` leaves.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    return encode(weight, None, scheme, out, fitted=True)


METHOD = Method(
    about="llama.cpp's types with less error than its encoders, no data",
    quantize=quantize,
    supports=without_importance,
    into=quantize,
    tables=True,
)
