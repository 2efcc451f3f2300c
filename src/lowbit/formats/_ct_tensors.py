"""Tensors of the compressed-tensors layouts: which a scheme takes, how they are filled, how they are read back.

Every function takes local names (`weight_packed`, `weight_scale`, ...): those of one module, its prefix removed.
The layouts are described in docs/formats/compressed-tensors.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Literal

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from lowbit import native
from lowbit.errors import FormatError
from lowbit.formats import Spec
from lowbit.formats._checks import below, exact, fill, finite, row_chunks, stored
from lowbit.schemes import FLOATS, ScaleType, Scheme
from lowbit.tensors import QTensor, Shape, block_size, scale_shape

Container = Literal[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
]
Strategy = Literal["tensor", "channel", "group", "tensor_group", "block"]
DTYPES: dict[ScaleType, torch.dtype] = {**FLOATS, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}
_E8M0_BIAS = 127
_E8M0_NAN = 255


def strategy(scheme: Scheme) -> Strategy:
    """compressed-tensors' word for the block that shares a scale."""
    named: dict[tuple[int, int], Strategy] = {(0, 0): "tensor", (1, 0): "channel"}
    block = scheme.block
    if (block.rows, block.cols) in named:
        return named[block.rows, block.cols]
    return "block" if block.rows != 1 else "tensor_group" if scheme.nested else "group"


def container(scheme: Scheme, activations: Scheme | None = None) -> Container:
    """The layout in which a scheme is written; unambiguous but for integers, for which docs/ give the rule."""
    if scheme.grid.kind == "int":
        plain = scheme.grid.bits == 8 and (activations or strategy(scheme) in ("tensor", "block"))
        return "int-quantized" if plain or (activations and activations.grid.kind == "int") else "pack-quantized"
    if scheme.grid.bits == 4:
        return "nvfp4-pack-quantized" if scheme.nested else "mxfp4-pack-quantized"
    return "mxfp8-quantized" if scheme.scale == "e8m0" else "float-quantized"


def layout(scheme: Scheme, shape: Shape, kind: Container) -> dict[str, Spec]:
    """Local names of the tensors that hold a weight `[rows, cols]`, with dtype and shape."""
    rows, cols = shape
    scales = _scale_shape(scheme, shape)
    specs = {"weight_scale": Spec(DTYPES[scheme.scale], scales)}
    if kind == "pack-quantized":
        specs["weight_packed"] = Spec(torch.int32, (rows, ceil(cols * scheme.grid.bits / 32)))
        specs["weight_shape"] = Spec(torch.int64, (2,))
    elif kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        specs["weight_packed"] = Spec(torch.uint8, (rows, cols // 2))
    else:
        specs["weight"] = Spec(torch.int8 if kind == "int-quantized" else torch.float8_e4m3fn, shape)
    if scheme.nested:
        specs["weight_global_scale"] = Spec(torch.float32, (1,))
    if scheme.zero == "int":
        packed = Spec(torch.int32, (ceil(scales[0] * scheme.grid.bits / 32), scales[-1]))
        specs["weight_zero_point"] = packed if _packs_zeros(scheme, kind) else Spec(torch.int8, scales)
    return specs


def _scale_shape(scheme: Scheme, shape: Shape) -> Shape:
    return (1,) if strategy(scheme) == "tensor" else scale_shape(shape, scheme.block)


def _packs_zeros(scheme: Scheme, kind: Container) -> bool:
    """compressed-tensors packs zero points in packed weights only, and there only these two strategies'."""
    return kind == "pack-quantized" and strategy(scheme) in ("group", "channel")


def pack(q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill tensors allocated as `layout` says; temporaries are of the size of the scales, or a few row chunks.

    Raises:
        FormatError: a value that the layout cannot hold.
    """
    kind = found_container(q.scheme, into)
    if q.group_index is not None:
        raise FormatError(
            "an act-order group index has no place: compressed-tensors dropped `actorder: group` in 0.20; "
            "the gptq format keeps it"
        )
    _pack_codes(q, kind, into)
    _pack_scales(q, into)
    if q.zeros is not None:
        _pack_zeros(q.zeros, q.scheme, kind, into["weight_zero_point"])


def hollow(scheme: Scheme) -> bool:
    """Whether the layouts can be checked without the codes: packed integers, for which every pattern of bits is one."""
    return scheme.grid.kind == "int"


def _pack_codes(q: QTensor, kind: Container, into: Mapping[str, Tensor]) -> None:
    if kind == "pack-quantized":
        into["weight_shape"].copy_(torch.tensor(q.shape))
    if q.codes.is_meta:
        return
    if q.scheme.grid.kind == "int":
        _pack_integers(q.codes, q.scheme, into)
    elif "weight" in into:
        into["weight"].view(torch.uint8).copy_(q.codes)
    else:
        _pack_nibbles(q.codes, into["weight_packed"])


def _pack_integers(codes: UInt8[Tensor, "rows cols"], scheme: Scheme, into: Mapping[str, Tensor]) -> None:
    if "weight" in into:
        torch.sub(codes, _half(scheme), out=into["weight"].view(torch.uint8))
    else:
        native.pack_bits(codes, scheme.grid.bits, out=into["weight_packed"])


def pack_rows(
    scheme: Scheme, cols: int, words: Int32[Tensor, "rows words"], start: int, into: Mapping[str, Tensor]
) -> None:
    """Fill rows of integer codes from `start` on."""
    rows = slice(start, start + len(words))
    if "weight" in into:
        codes = native.unpack_bits(words, scheme.grid.bits, cols)
        torch.sub(codes, _half(scheme), out=into["weight"].view(torch.uint8)[rows])
    else:
        fill(into["weight_packed"][rows], words)


def unpack_rows(
    scheme: Scheme, cols: int, tensors: Mapping[str, Tensor], start: int, words: Int32[Tensor, "rows words"]
) -> None:
    """The rows of integer codes from `start` on, of contiguous tensors."""
    rows = slice(start, start + len(words))
    if "weight" in tensors:
        codes = tensors["weight"].view(torch.uint8)[rows] + _half(scheme)
        native.pack_bits(codes, scheme.grid.bits, out=words)
    else:
        words.copy_(tensors["weight_packed"][rows])


def _pack_nibbles(codes: UInt8[Tensor, "rows cols"], out: UInt8[Tensor, "rows half"]) -> None:
    """Two codes a byte, the first in the low nibble. In chunks through words: `out` need not be aligned to words."""
    for rows in row_chunks(*codes.shape):
        words = torch.empty((rows.stop - rows.start, ceil(codes.shape[1] / 8)), dtype=torch.int32)
        native.pack_bits(codes[rows], 4, out=words)
        out[rows].copy_(words.view(torch.uint8))


def _pack_scales(q: QTensor, into: Mapping[str, Tensor]) -> None:
    out = into["weight_scale"]
    if isinstance(q.scales, QTensor):
        out.view(torch.uint8).copy_(q.scales.codes)
        into["weight_global_scale"].copy_(divisor(q.scales.scale_values()).reshape(1))
    elif q.scheme.scale == "e8m0":
        for rows in row_chunks(*q.scales.shape):
            out[rows].copy_(_exponents(q.scales[rows]))
    else:
        out.copy_(exact("weight_scale", q.scales, out.dtype).reshape(out.shape))


def divisor(multiplier: Float[Tensor, "1 1"]) -> Float[Tensor, "1 1"]:
    """The global scale to store: the float32 whose float32 reciprocal is `multiplier`.

    Raises:
        FormatError: there is none (a sixth of all float32 are no reciprocal of a float32).
    """
    stored_as = 1 / multiplier
    if not torch.equal(1 / stored_as, multiplier):
        raise FormatError(
            f"weight_global_scale: the layout stores the reciprocal of a global scale, and {multiplier.item():.9g} "
            "is the reciprocal of no float32; choose 1 / (1 / scale), computed in float32"
        )
    return stored_as


def _exponents(scales: Float[Tensor, "rows blocks"]) -> UInt8[Tensor, "rows blocks"]:
    """E8M0 bytes of scales that must be powers of two."""
    mantissa, exponent = torch.frexp(scales)
    biased = exponent - 1 + _E8M0_BIAS
    bad = (mantissa != 0.5) | (biased < 0)  # 2**128, the last that has no byte, is no float32
    if bad.any():
        raise FormatError(f"weight_scale: {scales[bad][0].item():.9g} is no power of two between 2**-127 and 2**127")
    return biased.to(torch.uint8)


def _pack_zeros(zeros: UInt8[Tensor, "rows cols"], scheme: Scheme, kind: Container, out: Tensor) -> None:
    if _packs_zeros(scheme, kind):
        native.pack_bits_transposed(zeros.T.contiguous(), scheme.grid.bits, out=out)
    else:
        out.copy_((zeros.to(torch.int16) - _half(scheme)).to(torch.int8).reshape(out.shape))


def _half(scheme: Scheme) -> int:
    return int(2 ** (scheme.grid.bits - 1))


def unpack(scheme: Scheme, shape: Shape, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The `QTensor` `[rows, cols]` that stored tensors mean; codes of FP8 weights are a view of them.

    `codes`, where given, is a buffer `[rows, cols]` for those of the others.

    Raises:
        FormatError: a tensor is missing or has another dtype or shape, or holds what the layout forbids.
    """
    kind = found_container(scheme, tensors)
    specs = layout(scheme, shape, kind)
    parts = {name: _part(tensors, name, spec, scheme) for name, spec in specs.items() if name != "weight_shape"}
    if kind == "pack-quantized":
        check_shape(tensors, shape)
    codes = _unpack_codes(scheme, kind, parts, torch.empty(shape, dtype=torch.uint8) if codes is None else codes)
    zeros = _unpack_zeros(scheme, shape, kind, parts["weight_zero_point"]) if scheme.zero == "int" else None
    q = QTensor(scheme, shape, codes, _unpack_scales(scheme, shape, parts), zeros)
    if "weight_g_idx" in tensors:
        q = replace(q, group_index=_group_index(q, tensors))
    return q


def found_container(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Container:
    """The layout that stored tensors have: integers may be packed or plain whatever the rule for writing says."""
    if scheme.grid.kind != "int":
        return container(scheme)
    return "int-quantized" if "weight" in tensors else "pack-quantized"


def _part(tensors: Mapping[str, Tensor], name: str, spec: Spec, scheme: Scheme) -> Tensor:
    """A stored tensor as `layout` has it; scales and zero points may lack or have extra axes of length 1."""
    tensor = tensors.get(name)
    small = name in ("weight_scale", "weight_zero_point", "weight_global_scale")
    if small and tensor is not None and _long_axes(tensor.shape) == _long_axes(spec.shape):
        tensors = {name: tensor.reshape(spec.shape)}
    return stored(tensors, name, spec.dtype, spec.shape)


def _long_axes(shape: Shape) -> list[int]:
    return [size for size in shape if size != 1]


def check_shape(tensors: Mapping[str, Tensor], shape: Shape) -> None:
    """`weight_shape` must say `shape`.

    Raises:
        FormatError: it is missing, no pair of integers, or says something else.
    """
    dtype = torch.int32 if "weight_shape" in tensors and tensors["weight_shape"].dtype == torch.int32 else torch.int64
    found = stored(tensors, "weight_shape", dtype, (2,)).tolist()
    if found != list(shape):
        raise FormatError(f"weight_shape says {found} where the weight is {list(shape)}")


def _unpack_codes(
    scheme: Scheme, kind: Container, parts: Mapping[str, Tensor], codes: UInt8[Tensor, "rows cols"]
) -> UInt8[Tensor, "rows cols"]:
    if codes.is_meta:
        if kind == "int-quantized" and scheme.grid.bits < 8:
            below("weight", parts["weight"].view(torch.uint8) + _half(scheme), 2**scheme.grid.bits)
        return codes
    if kind in ("float-quantized", "mxfp8-quantized"):
        return _no_nan("weight", parts["weight"].view(torch.uint8))
    if scheme.grid.kind == "int":
        _unpack_integers(scheme, parts, codes)
        below("weight", codes, 2**scheme.grid.bits)
    else:
        _unpack_nibbles(parts["weight_packed"], codes)
    return codes


def _unpack_integers(scheme: Scheme, parts: Mapping[str, Tensor], codes: UInt8[Tensor, "rows cols"]) -> None:
    if "weight" in parts:
        torch.add(parts["weight"].view(torch.uint8), _half(scheme), out=codes)
    else:
        native.unpack_bits(parts["weight_packed"].contiguous(), scheme.grid.bits, codes.shape[1], out=codes)


def _unpack_nibbles(stored_bytes: UInt8[Tensor, "rows half"], codes: UInt8[Tensor, "rows cols"]) -> None:
    """Widths are multiples of 16 codes (`fit`), so that every row is whole words."""
    for rows in row_chunks(*codes.shape):
        words = torch.empty((rows.stop - rows.start, codes.shape[1] // 8), dtype=torch.int32)
        words.view(torch.uint8).copy_(stored_bytes[rows])
        native.unpack_bits(words, 4, codes.shape[1], out=codes[rows])


def _no_nan(name: str, codes: UInt8[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
    """E4M3 bytes, none of which may be one of the two NaN."""
    for rows in row_chunks(*codes.shape):
        magnitudes = codes[rows] & 0x7F
        if magnitudes.numel() and magnitudes.amax() == 0x7F:
            row, col = (magnitudes == 0x7F).nonzero()[0].tolist()
            raise FormatError(f"{name} holds NaN at {[rows.start + row, col]}; it must be finite")
    return codes


def _unpack_scales(scheme: Scheme, shape: Shape, parts: Mapping[str, Tensor]) -> Tensor | QTensor:
    blocks, found = scale_shape(shape, scheme.block), parts["weight_scale"]
    if scheme.nested:
        codes = _no_nan("weight_scale", found.view(torch.uint8))
        multiplier = finite(
            "weight_global_scale (its reciprocal)", 1 / finite("weight_global_scale", parts["weight_global_scale"])
        )
        return QTensor(scheme.nested, blocks, codes, multiplier.reshape(1, 1))
    if scheme.scale == "e8m0":
        powers = torch.ldexp(torch.ones(_E8M0_NAN), torch.arange(_E8M0_NAN) - _E8M0_BIAS)
        return powers.index_select(0, below("weight_scale", found, _E8M0_NAN).int().reshape(-1)).reshape(blocks)
    return finite("weight_scale", found).float().reshape(blocks)


def _unpack_zeros(scheme: Scheme, shape: Shape, kind: Container, found: Tensor) -> UInt8[Tensor, "rows cols"]:
    blocks, bits = scale_shape(shape, scheme.block), scheme.grid.bits
    if _packs_zeros(scheme, kind):
        return native.unpack_bits_transposed(found.contiguous(), bits, blocks[0]).T.contiguous()
    zeros = (found.view(torch.uint8) + _half(scheme)).reshape(blocks)
    return below("weight_zero_point", zeros, 2**bits)


def _group_index(q: QTensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The group of each column, or None where groups are consecutive after all."""
    cols, groups = q.codes.shape[1], q.scales.shape[1]
    index = stored(tensors, "weight_g_idx", torch.int32, (cols,))
    if ((index < 0) | (index >= groups)).any():
        raise FormatError(f"weight_g_idx names a group that is not among the {groups} there are")
    consecutive = torch.arange(cols, dtype=torch.int32) // block_size(q.shape, q.scheme.block)[1]
    return None if torch.equal(index, consecutive) else index
