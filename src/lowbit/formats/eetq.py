"""EETQ: 8-bit integers with a scale per output, in the order of CUTLASS's kernel (docs/formats/eetq.md).

`weight` is int8 `[K, N]`, whose bytes are the codes of W `[N, K]` as `[N/2, K/64, 2, 4, 8, 2]`: two outputs take turns
in tiles of 64 inputs, and of each 16 inputs i stands before i + 8. `weight_scales` `[N]`, float16, multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats._checks import exact, finite, stored
from lowbit.formats._linear import (
    check_matrix,
    check_planned,
    declared,
    documents,
    model_dtype,
    planned,
    row_block,
)
from lowbit.schemes import FLOATS, Scheme, parse
from lowbit.tensors import QTensor

_ROWS = parse("int8-row-f16")
_TILE = 64


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """Symmetric 8-bit rows with float16 scales.

    Raises:
        UnsupportedError: another scheme, sides that 64 does not divide, or the output head.
    """
    check_matrix(weight, "eetq", scheme)
    fitted = replace(scheme, block=row_block(scheme.block, weight.shape[1]), scale="f16")
    if scheme.scale not in FLOATS or fitted != _ROWS:
        raise UnsupportedError(f"eetq cannot hold {scheme}: it has {_ROWS}; use that")
    if any(side % _TILE for side in weight.shape):
        raise UnsupportedError(
            f"eetq cannot hold {weight.name} {list(weight.shape)}: its kernel takes tiles of {_TILE}, which must "
            "divide both sides; leave it as it is (--skip)"
        )
    if weight.module.rpartition(".")[2] == "lm_head":
        raise UnsupportedError("readers of eetq leave the output head as it is; leave it as it is (--skip)")
    return _ROWS


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    rows, cols = weight.shape
    return {
        f"{weight.module}.weight": Spec(torch.int8, (cols, rows)),
        f"{weight.module}.weight_scales": Spec(torch.float16, (rows,)),
    }


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def _stored_order(codes: UInt8[Tensor, "rows cols"]) -> Tensor:
    """A view of the codes as their bytes are stored: `[N/2, K/64, 2, 4, 8, 2]`."""
    rows, cols = codes.shape
    return codes.view(rows // 2, 2, cols // _TILE, _TILE // 16, 2, 8).permute(0, 2, 1, 3, 5, 4)


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a scale that float16 does not have.
    """
    check_planned(weight, q)
    assert isinstance(q.scales, Tensor)
    codes, scales = (into[name] for name in layout(weight))
    scales.copy_(exact(f"{weight.module}.weight_scales", q.scales, scales.dtype).reshape(-1))
    source = _stored_order(q.codes.contiguous())
    codes.view(torch.uint8).view(source.shape).copy_(source)


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    (packed, scales) = (stored(tensors, name, s.dtype, s.shape) for name, s in layout(weight).items())
    scales = finite(f"{weight.module}.weight_scales", scales).float().reshape(-1, 1)
    codes = torch.empty(weight.shape, dtype=torch.uint8) if codes is None else codes
    target = _stored_order(codes)
    target.copy_(packed.contiguous().view(torch.uint8).view(target.shape))
    return QTensor(planned(weight), weight.shape, codes, scales)


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `EetqConfig`."""
    return documents(weights, source, {"quant_method": "eetq", "weights": "int8"})


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares `eetq`.

    Raises:
        FormatError: other weights than int8, or tensors that break the layout.
    """
    quantization = declared(config)
    if quantization.get("quant_method") != "eetq":
        return None
    if quantization.get("weights", "int8") != "int8":
        raise FormatError(f"weights {quantization['weights']!r} of quant_method eetq is not read, int8 is")
    scaled = {name.removesuffix("_scales") for name in specs if name.endswith(".weight_scales")}
    codes = {name for name, spec in specs.items() if spec.dtype == torch.int8 and name.endswith(".weight")}
    for name in sorted(scaled ^ codes):
        raise FormatError(f"{name} is not stored in int8 with {name}_scales beside it")
    dtype = model_dtype(config)
    return {name: _recognised(name, specs[name].shape, dtype) for name in specs if name in codes}


def _recognised(name: str, shape: Sequence[int], dtype: torch.dtype) -> Weight:
    if len(shape) != 2 or any(side % _TILE for side in shape):
        raise FormatError(f"{name} is {list(shape)}, not a matrix whose sides {_TILE} divides")
    return Weight(name, (shape[1], shape[0]), dtype, _ROWS)


FORMAT = Format(
    about="EETQ: 8-bit integers with a scale per output, as transformers loads them on a GPU",
    default=str(_ROWS),
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
)
