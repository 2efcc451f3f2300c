"""llama.cpp's block types, fitted under an importance matrix. See `docs/methods/imatrix_fit.md`."""

from __future__ import annotations

from jaxtyping import Float, UInt8
from torch import Tensor

from lowbit.methods import Method, NoOptions, Stats
from lowbit.methods._ggml import encode, objection
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor


def quantize(
    weight: Float[Tensor, "rows cols"],
    stats: Stats,
    scheme: Scheme,
    options: NoOptions,
    out: UInt8[Tensor, "rows cols"] | None = None,
) -> QTensor:
    """Scales, minima and codes of little squared error weighted by the inputs: less in a weight than `imatrix` leaves.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    return encode(weight, stats["mean_square"], scheme, out, fitted=True)


METHOD = Method(
    about="llama.cpp's types with less error than its encoders, with an importance matrix",
    quantize=quantize,
    needs=frozenset({"mean_square"}),
    outside="ggml_fit",
    supports=objection,
    into=quantize,
    tables=True,
)
