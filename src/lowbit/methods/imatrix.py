"""llama.cpp's own encoders under an importance matrix, equal to the byte. See `docs/methods/imatrix.md`."""

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
    """What `ggml_quantize_chunk` gives with the mean square of each input as importance.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    return encode(weight, stats["mean_square"], scheme, out)


METHOD = Method(
    about="llama.cpp's encoders, to the byte, with an importance matrix",
    quantize=quantize,
    needs=frozenset({"mean_square"}),
    outside="ggml",
    supports=objection,
    into=quantize,
    tables=True,
)
