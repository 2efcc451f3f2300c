"""llama.cpp's own encoders without data, equal to the byte. See `docs/methods/ggml.md`."""

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
    """What `ggml_quantize_chunk` gives without an importance matrix.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    return encode(weight, None, scheme, out)


METHOD = Method(
    about="llama.cpp's encoders, to the byte, no data",
    quantize=quantize,
    supports=without_importance,
    into=quantize,
    tables=True,
)
