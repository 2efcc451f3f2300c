"""llama.cpp's own encoders without data, equal to the byte. See `docs/methods/ggml.md`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lowbit.methods import Method, NoOptions, Stats
from lowbit.methods._ggml import encode, objection
from lowbit.schemes import Scheme
from lowbit.tensors import QTensor


def quantize(weight: Float[Tensor, "rows cols"], stats: Stats, scheme: Scheme, options: NoOptions) -> QTensor:
    """What `ggml_quantize_chunk` gives without an importance matrix.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    return encode(weight, None, scheme)


def supports(scheme: Scheme) -> str | None:
    """A type that llama.cpp encodes without an importance matrix."""
    if str(scheme) in ("iq1_s", "iq2_xxs", "iq2_xs"):
        return f"llama.cpp encodes {scheme} under an importance matrix alone; use imatrix"
    return objection(scheme)


METHOD = Method(about="llama.cpp's encoders, to the byte, no data", quantize=quantize, supports=supports, tables=True)
