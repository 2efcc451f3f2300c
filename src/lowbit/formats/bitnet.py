"""BitNet's packed ternary weights, as `transformers` loads them (docs/formats/bitnet.md).

A weight `[N, K]` is `weight` uint8 `[N/4, K]`: four codes a byte, from the four quarters of the rows, the first in the
lowest bits; a code is the level plus one. `weight_scale` `[1]` multiplies (`autobitlinear`) or divides (`bitlinear`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats._checks import below, exact, finite, row_chunks, stored
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    check_planned,
    declared,
    documents,
    planned,
)
from lowbit.schemes import FLOATS, Scheme, parse
from lowbit.tensors import QTensor

_TERNARY = parse("levels[-1,0,1]-tensor")
_QUARTERS, _BITS = 4, 2


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """Ternary with one scale, in the dtype of the weight.

    Raises:
        UnsupportedError: another scheme, or rows that do not come in fours.
    """
    check_matrix(weight, "bitnet", scheme)
    if scheme.grid != _TERNARY.grid or scheme.block != _TERNARY.block or scheme.nested:
        raise UnsupportedError(f"bitnet cannot hold {scheme}: it has one scheme, {_TERNARY}; use that")
    if weight.shape[0] % _QUARTERS:
        raise UnsupportedError(
            f"bitnet packs the four quarters of the rows together, and {weight.name} has {weight.shape[0]}; leave it "
            "as it is (--skip)"
        )
    if weight.module.rpartition(".")[2] == "lm_head":
        raise UnsupportedError("readers of bitnet leave the output head as it is; leave it as it is (--skip)")
    return replace(_TERNARY, scale=SCALE_TYPES[weight.dtype])


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    rows, cols = weight.shape
    return {
        f"{weight.module}.weight": Spec(torch.uint8, (rows // _QUARTERS, cols)),
        f"{weight.module}.weight_scale": Spec(weight.dtype, (1,)),
    }


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight, with a scale that multiplies.

    Raises:
        FormatError: a scale that the weight's dtype does not have.
    """
    check_planned(weight, q)
    assert isinstance(q.scales, Tensor)
    scale = into[f"{weight.module}.weight_scale"]
    scale.copy_(exact(f"{weight.module}.weight_scale", q.scales, scale.dtype).reshape(1))
    out = into[f"{weight.module}.weight"]
    for rows, quarters in _quarters(q.codes, out.shape[0]):
        target = out[rows].zero_()
        for i, part in enumerate(quarters):
            target |= part << _BITS * i


def _quarters(codes: UInt8[Tensor, "rows cols"], packed: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Runs of packed rows, with the codes of each of the four quarters."""
    for rows in row_chunks(packed, codes.shape[1]):
        starts = [i * packed + rows.start for i in range(_QUARTERS)]
        yield rows, [codes[start : start + rows.stop - rows.start] for start in starts]


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    (full, spec), (name, _) = layout(weight).items()
    packed = stored(tensors, full, spec.dtype, spec.shape)
    scale = finite(name, stored(tensors, name, weight.dtype, (1,))).float()
    if _divides(weight):
        scale = finite(f"{name}, or its reciprocal,", 1 / scale)
    codes = torch.empty(weight.shape, dtype=torch.uint8) if codes is None else codes
    for rows, quarters in _quarters(codes, packed.shape[0]):
        for i, part in enumerate(quarters):
            part.copy_(packed[rows] >> _BITS * i & 2**_BITS - 1)
    levels = len(_TERNARY.grid.levels)
    return QTensor(planned(weight), weight.shape, below(full, codes, levels), scale.reshape(1, 1))


def _divides(weight: Weight) -> bool:
    """Whether the stored scale divides: it is recognised with its reciprocal, which is a float32, for its scale."""
    return FLOATS[planned(weight).scale] != weight.dtype


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `BitNetQuantConfig`."""
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
    }
    return documents(weights, source, quantization)


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares `bitnet`.

    Raises:
        FormatError: a declaration that contradicts the stored tensors, or a kind of BitNet that is not read.
    """
    quantization = declared(config)
    if quantization.get("quant_method") != "bitnet":
        return None
    kind = quantization.get("linear_class") or "bitlinear"
    if kind not in ("bitlinear", "autobitlinear"):
        raise FormatError(f"linear_class {kind!r} of quant_method bitnet is not read, bitlinear and autobitlinear are")
    names = [name.removesuffix("_scale") for name in specs if name.endswith(".weight_scale")]
    alone = [name for name, spec in specs.items() if spec.dtype == torch.uint8 and name not in names]
    if alone:
        raise FormatError(f"{alone[0]}_scale is missing")
    weights = [_recognised(name, kind == "bitlinear", specs) for name in names]
    return {weight.name: weight for weight in weights}


def _recognised(name: str, divides: bool, specs: Mapping[str, Spec]) -> Weight:
    dtype, packed = specs[f"{name}_scale"].dtype, specs.get(name)
    if dtype not in SCALE_TYPES or (divides and dtype == torch.float32):
        raise FormatError(f"{name}_scale is {dtype}, which is not read (of float32 ones that divide, neither)")
    if packed is None or len(packed.shape) != 2:
        raise FormatError(f"{name} is {list(packed.shape) if packed else 'missing'}, not a matrix")
    scheme = replace(_TERNARY, scale="f32" if divides else SCALE_TYPES[dtype])
    return Weight(name, (packed.shape[0] * _QUARTERS, packed.shape[1]), dtype, scheme)


FORMAT = Format(
    about="BitNet's packed ternary weights with one scale, as transformers loads them",
    default=str(_TERNARY),
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
)
