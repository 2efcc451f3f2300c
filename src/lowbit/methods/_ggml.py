"""llama.cpp's encoders as methods: what `ggml_quantize_chunk` finds, to the bit, as a `QTensor`.

The algorithms are native (`csrc/ggml_encode.h`); here rows are filled up to whole blocks and results cut again.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from lowbit import native
from lowbit.methods._scales import finite_range
from lowbit.schemes import ALIASES, GGML_TYPES, Scheme, parse
from lowbit.tensors import QTensor, scale_shape

_ROW = parse("int8-row")  # whole rows are looked through faster than blocks
_IDS = {parse(name): number for name, number in GGML_TYPES.items() if name != "nvfp4"}  # whose scale is the tensor's


def objection(scheme: Scheme) -> str | None:
    """A scheme must be one of llama.cpp's types."""
    if scheme in _IDS:
        return None
    plain = ", ".join(ALIASES[name] for name in ("q4_0", "q5_0", "q8_0"))
    return f"llama.cpp has no such type; use q4_k or another of its names, or {plain}"


def without_importance(scheme: Scheme) -> str | None:
    """It must be a type that llama.cpp encodes without an importance matrix."""
    if str(scheme) in ("iq1_s", "iq2_xxs", "iq2_xs"):
        return f"llama.cpp encodes {scheme} under an importance matrix alone; use imatrix"
    return objection(scheme)


def encode(
    weight: Float[Tensor, "rows cols"],
    importance: Float[Tensor, " cols"] | None,
    scheme: Scheme,
    out: UInt8[Tensor, "rows cols"] | None,
    fitted: bool = False,
) -> QTensor:
    """The weight in one of llama.cpp's types, `fitted` with less error than llama.cpp's own encoder leaves.

    Codes go to `out`, where it is given. A shorter last block is encoded as if zeros without importance followed. Of
    types with tables the scales alone are fitted, under llama.cpp's runs.

    Raises:
        WeightError: NaN or Inf, with its place.
    """
    (rows, cols), whole = weight.shape, scheme.block.cols * (scheme.nested.block.cols if scheme.nested else 1)
    tail = -cols % whole
    filled = pad(weight, (0, tail)) if tail else weight
    wanted = None if importance is None else pad(importance.float(), (0, tail))
    found = _room(rows, cols + tail, whole, scheme, None if tail else out)
    if weight.numel() and not native.ggml_encode(_IDS[scheme], filled, wanted, out=found, fitted=fitted):
        finite_range(weight, {}, _ROW)  # raises, with the place
    scales = _part(found.scale, found.scale_codes, (rows, cols), scheme)
    minima = None if found.min is None else _part(found.min, found.min_codes, (rows, cols), scheme)
    codes = found.codes[:, :cols].contiguous()
    return QTensor(scheme, (rows, cols), out.copy_(codes) if tail and out is not None else codes, scales, minima=minima)


def _room(rows: int, cols: int, whole: int, scheme: Scheme, codes: Tensor | None) -> native.GgmlBlocks:
    """Memory for what the encoder finds; codes go where they are told to."""
    codes = torch.empty(rows, cols, dtype=torch.uint8) if codes is None else codes
    found = native.GgmlBlocks(codes, torch.empty(rows, cols // whole))
    if scheme.zero == "min":
        found = replace(found, min=torch.empty_like(found.scale))
    if scheme.nested:
        subs = torch.empty(rows, cols // scheme.block.cols, dtype=torch.uint8)
        found = replace(found, scale_codes=subs, min_codes=None if found.min is None else torch.empty_like(subs))
    return found


def _part(
    values: Float[Tensor, "rows blocks"], codes: Tensor | None, shape: tuple[int, int], scheme: Scheme
) -> Tensor | QTensor:
    """Scales or minima of the blocks that the weight really has."""
    blocks = scale_shape(shape, scheme.block)
    if scheme.nested is None or codes is None:
        return values
    return QTensor(
        scheme.nested,
        blocks,
        codes[:, : blocks[1]].contiguous(),
        values[:, : ceil(blocks[1] / scheme.nested.block.cols)].contiguous(),
    )
