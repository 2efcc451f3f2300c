"""SpQR's tiles of 3 bits with sparse outliers, as `spqr_quant` and `transformers` load them (docs/formats/spqr.md).

`dense_weights` int64 has a word for each of the 16 rows of a tile of 16 x 16, tiles along the rows first. Of its bits,
from the lowest: 3 of the scale's code, 3 of the zero point's, 16 x 3 of codes, 8 of what the tile's rows share: row k
has byte `k // 2` of four float16, scale and zero point of scales and zero points. Outliers are rows of CSR.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats._checks import exact, finite, stored
from lowbit.formats._linear import check_matrix, check_planned, declare, declared, planned, skipped_modules
from lowbit.schemes import SPQR, Scheme, parse
from lowbit.tensors import Outliers, QTensor

_TILE, _BITS, _SHARED = 16, 3, 54
_PARTS = ("dense_weights", "row_offsets", "col_vals", "in_perm")
_DECLARED = {"bits": _BITS, "beta1": _TILE, "beta2": _TILE}


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The one scheme of this layout, on whole tiles.

    Raises:
        UnsupportedError: another scheme, or a weight of no whole tiles.
    """
    check_matrix(weight, "spqr", scheme)
    if scheme.zero != "quantized":
        raise UnsupportedError(
            f"spqr cannot hold {scheme}: it has 3 bits under quantized scales and outliers, which no method makes yet; "
            "convert keeps those of a checkpoint"
        )
    if weight.shape[0] % _TILE or weight.shape[1] % _TILE or weight.shape[1] > 1 << 16:
        raise UnsupportedError(f"spqr has tiles of 16 x 16, which do not divide a weight of {list(weight.shape)}")
    return scheme


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    scheme, (rows, cols) = planned(weight), weight.shape
    parts = {
        "dense_weights": Spec(torch.int64, (rows * cols // _TILE,)),
        "row_offsets": Spec(torch.int32, (rows + 1,)),
        "col_vals": Spec(torch.int32, (scheme.outliers,)),
    }
    if scheme.perm:
        parts["in_perm"] = Spec(torch.int32, (cols // 2,))
    return {f"{weight.module}.{name}": spec for name, spec in parts.items()}


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return [f"{weight.module}.{name}" for name in _PARTS]


def _tiles(values: Tensor, rows: int, wide: int) -> Tensor:
    """`[rows, across * wide]` as `[tiles down, tiles across, 16, wide]`."""
    return values.view(rows // _TILE, _TILE, -1, wide).permute(0, 2, 1, 3)


def _untiled(values: Tensor) -> Tensor:
    """The inverse of `_tiles`."""
    down, across, high, wide = values.shape
    return values.permute(0, 2, 1, 3).reshape(down * high, across * wide).contiguous()  # a view, where one is 1


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a number that float16 does not have.
    """
    check_planned(weight, q)
    module, (rows, cols) = weight.module, weight.shape
    assert isinstance(q.scales, QTensor) and q.points is not None
    words = torch.zeros(rows // _TILE, cols // _TILE, _TILE, dtype=torch.int64)
    fields = [_tiles(part.codes, rows, 1)[..., 0] for part in (q.scales, q.points)]
    fields += list(_tiles(q.codes, rows, _TILE).unbind(-1))
    for i, field in enumerate(fields):
        words |= field.long() << _BITS * i
    shared = torch.stack([exact(f"{module}.dense_weights", part, torch.float16) for part in _second(q)], -1)
    pieces = shared.contiguous().view(torch.uint8).view(*shared.shape[:-1], 8)  # as the bytes lie in the file
    words |= pieces.repeat_interleave(2, -1).long() << _SHARED
    into[f"{module}.dense_weights"].copy_(words.reshape(-1))
    offsets = torch.zeros(rows + 1, dtype=torch.int32)
    if q.outliers:
        offsets[1:] = torch.bincount(q.outliers.rows, minlength=rows).cumsum(0)
        values = exact(f"{module}.col_vals", q.outliers.values, torch.float16).view(torch.int16).int() << 16
        into[f"{module}.col_vals"].copy_(values | q.outliers.cols)
    into[f"{module}.row_offsets"].copy_(offsets)
    if q.order is not None:
        into[f"{module}.in_perm"].copy_(q.order[1::2] << 16 | q.order[::2])


def _second(q: QTensor) -> list[Tensor]:
    """`[tiles down, tiles across]` of each number that a tile's rows share, in the order of the file."""
    assert isinstance(q.scales, QTensor) and q.points is not None
    found = [q.scales.scales, q.points.scales, q.scales.zeros, q.points.zeros]
    return [part for part in found if isinstance(part, Tensor)]


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    scheme, module, (rows, cols) = planned(weight), weight.module, weight.shape
    found = {name: stored(tensors, name, spec.dtype, spec.shape) for name, spec in layout(weight).items()
             if prod(spec.shape)}  # fmt: skip
    words = found[f"{module}.dense_weights"].view(rows // _TILE, cols // _TILE, _TILE)
    codes = torch.empty(rows, cols, dtype=torch.uint8) if codes is None else codes
    for i in range(_TILE):
        codes.view(rows, cols // _TILE, _TILE)[..., i] = _untiled(_field(words, 2 + i)[..., None])
    shared = _shared(f"{module}.dense_weights", words)
    assert scheme.nested
    scales, points = (
        QTensor(scheme.nested, (rows, cols // _TILE), _untiled(_field(words, i)[..., None]),
                shared[..., i].float().contiguous(), shared[..., 2 + i].float().contiguous())
        for i in range(2)
    )  # fmt: skip
    order = _order(f"{module}.in_perm", found[f"{module}.in_perm"]) if scheme.perm else None
    outliers = _outliers(weight, found) if scheme.outliers else None
    return QTensor(scheme, weight.shape, codes, scales, order=order, points=points, outliers=outliers)


def _field(words: Int64[Tensor, "down across high"], at: int) -> UInt8[Tensor, "down across high"]:
    found: Tensor = words >> _BITS * at & 2**_BITS - 1
    return found.to(torch.uint8)


def _shared(name: str, words: Int64[Tensor, "down across high"]) -> Tensor:
    """`[down, across, 4]` float16 from the bytes that the rows of a tile have, each byte two of them."""
    pieces = (words >> _SHARED & 255).to(torch.uint8).view(*words.shape[:2], 8, 2)
    if not torch.equal(pieces[..., 0], pieces[..., 1]):
        raise FormatError(f"{name} holds tiles whose rows do not agree on the scales of their scales")
    return finite(name, pieces[..., 0].contiguous().view(torch.float16))


def _order(name: str, packed: Int32[Tensor, "pairs"]) -> Int32[Tensor, "cols"]:
    order = torch.stack([packed & 2**16 - 1, packed >> 16 & 2**16 - 1], 1).reshape(-1)
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=torch.int32)):
        raise FormatError(f"{name} is no order of {len(order)} columns: it does not name each of them once")
    return order


def _outliers(weight: Weight, found: Mapping[str, Tensor]) -> Outliers:
    offsets, packed = (found[f"{weight.module}.{name}"] for name in ("row_offsets", "col_vals"))
    counts = offsets.diff()
    if int(offsets[0]) or int(offsets[-1]) != len(packed) or int(counts.min()) < 0:
        raise FormatError(f"{weight.module}.row_offsets does not lead from 0 to the {len(packed)} outliers, row by row")
    cols = packed & 2**16 - 1
    if int(cols.max()) >= weight.shape[1]:
        raise FormatError(f"{weight.module}.col_vals names column {int(cols.max())} of {weight.shape[1]}")
    values = (packed >> 16).to(torch.int16).view(torch.float16)
    rows = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), counts.long())
    return Outliers(rows, cols, finite(f"{weight.module}.col_vals", values).float())


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `SpQRConfig`, which needs the size of every tensor."""
    chosen = [weight for weight in weights if weight.scheme]
    if not chosen:
        return {"config.json": declare(source, None)}
    shapes = {f"{weight.module}.{name}.shape": 0 for weight in chosen for name in _PARTS}
    shapes |= {f"{name}.shape": spec.shape[0] for weight in chosen for name, spec in layout(weight).items()}
    quantization = {
        "quant_method": "spqr",
        **_DECLARED,
        "shapes": shapes,
        "modules_to_not_convert": skipped_modules(weights),
    }
    return {"config.json": declare(source, quantization)}


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares SpQR.

    Raises:
        FormatError: a kind of SpQR that is not read, or tensors that contradict each other.
    """
    quantization = declared(config)
    if quantization.get("quant_method") != "spqr":
        return None
    said = {field: quantization.get(field, value) for field, value in _DECLARED.items()}
    if said != _DECLARED:
        raise FormatError(f"spqr with {said} is not read, {_DECLARED} is")
    modules = [name.removesuffix(".dense_weights") for name in specs if name.endswith(".dense_weights")]
    weights = [_recognised(module, specs) for module in modules]
    return {weight.name: weight for weight in weights}


def _recognised(module: str, specs: Mapping[str, Spec]) -> Weight:
    absent = [name for name in _PARTS[:3] if f"{module}.{name}" not in specs]
    if absent:
        raise FormatError(f"{module}.{absent[0]} is missing")
    words, offsets, outliers = (prod(specs[f"{module}.{name}"].shape) for name in _PARTS[:3])
    order = prod(specs[f"{module}.in_perm"].shape) if f"{module}.in_perm" in specs else 0
    rows = offsets - 1
    if rows < 1 or rows % _TILE or words % rows or (order and 2 * order != words * _TILE // rows):
        raise FormatError(
            f"{module}: {words} words, {offsets} offsets and {order} pairs of columns are no tiles of 16 x 16 with an "
            "offset for every row; outliers in the order of tiles (ptcsr) are not read, --sparse_strategy csr has rows"
        )
    options = ("-perm" if order else "") + (f"-sparse{outliers}" if outliers else "")
    return Weight(f"{module}.weight", (rows, words * _TILE // rows), torch.float16, parse(f"spqr{options}"))


FORMAT = Format(
    about="SpQR: 3 bits under quantized scales, with sparse outliers",
    default=str(SPQR),
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
)
