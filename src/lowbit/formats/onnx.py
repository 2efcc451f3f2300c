"""onnx: weights of `MatMulNBits` and of `DequantizeLinear`; the graph around them is `stages/_onnx_write.py`'s.

Source: the schema of `com.microsoft::MatMulNBits` in onnxruntime, and of `DequantizeLinear` in ONNX (opset 21).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit import native
from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats._checks import exact, finite, stored
from lowbit.formats._linear import check_matrix, check_planned, declare, planned, row_block
from lowbit.schemes import FLOATS, Block, Scheme
from lowbit.tensors import QTensor, scale_shape

METHOD = "onnx"  # what config.json declares
BITS = (2, 4, 8)
_SMALLEST, _LARGEST_OF_2_BITS = 16, 256
_WORD = 32


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme with groups that are a power of two, or int8 with a scale per row or tensor.

    Raises:
        UnsupportedError: neither operator holds it.
    """
    check_matrix(weight, "onnx", scheme)
    if scheme.grid.kind != "int" or scheme.grid.bits not in BITS or scheme.nested or scheme.zero == "min":
        raise UnsupportedError(
            f"onnx cannot hold {scheme}: onnxruntime computes with integers of 2, 4 and 8 bits with plain scales; use "
            "int4-g32 or int4-g32-asym"
        )
    if scheme.scale not in FLOATS:
        raise UnsupportedError(f"onnx cannot hold {scheme}: its scales are floats of 16 or 32 bits")
    if scheme.zero == "float" and scheme.grid.bits == 8:
        raise UnsupportedError(f"onnx cannot hold {scheme}: zero points of 8-bit weights are integers; use asym")
    cols, bits = weight.shape[1], scheme.grid.bits
    block = row_block(scheme.block, cols) if scheme.block.flat else scheme.block
    if by_row(replace(scheme, block=block)):
        return replace(scheme, block=block)
    if block == Block(1, 0):
        block = Block(1, max(_SMALLEST, 1 << max(cols - 1, 0).bit_length()))
    largest = _LARGEST_OF_2_BITS if bits == 2 else block.cols
    power = block.cols & (block.cols - 1) == 0
    if block.rows != 1 or block.flat or not power or not _SMALLEST <= block.cols <= largest:
        raise UnsupportedError(
            f"onnx cannot hold {scheme}: groups of MatMulNBits are powers of two along the row, from 16 on"
            f"{' to 256 with 2 bits' if bits == 2 else ''}; use int{bits}-g32"
        )
    return replace(scheme, block=block)


def by_row(scheme: Scheme) -> bool:
    """Whether it is of `DequantizeLinear`: 8 bits, a scale per row or one; all else is of `MatMulNBits`."""
    return scheme.grid.bits == 8 and scheme.block in (Block(1, 0), Block(0, 0))


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills.

    `MatMulNBits`: codes `[rows, blocks, bytes]`, scales and zero points (packed along the blocks, or floats) by rows.
    `DequantizeLinear`: codes `[rows, cols]`, a scale for each row, or one.
    """
    scheme, (rows, cols) = planned(weight), weight.shape
    blocks, bits, scale = scale_shape(weight.shape, scheme.block), scheme.grid.bits, FLOATS[scheme.scale]
    if by_row(scheme):
        each: tuple[int, ...] = (rows,) if scheme.block.rows else ()
        codes = Spec(torch.uint8 if scheme.zero == "int" else torch.int8, (rows, cols))
        zeros = Spec(torch.uint8, each)
    else:
        each = blocks
        codes = Spec(torch.uint8, (*blocks, scheme.block.cols * bits // 8))
        packed = Spec(torch.uint8, (rows, ceil(blocks[1] * bits / 8)))
        zeros = packed if scheme.zero == "int" else Spec(scale, blocks)
    module, specs = weight.module, {weight.name: codes, f"{weight.module}.scales": Spec(scale, each)}
    return specs if scheme.zero == "none" else {**specs, f"{module}.zero_points": zeros}


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight; the last block of a row is filled with code 0.

    Raises:
        FormatError: another tensor than the planned one, blocks of columns that are not consecutive, or a scale that is
            not exact in its type.
    """
    check_planned(weight, q)
    if q.group_index is not None:
        raise FormatError(f"{weight.name}: onnx has no act-order, its blocks are of consecutive columns")
    assert isinstance(q.scales, Tensor)
    scheme, codes, scales = q.scheme, into[weight.name], into[f"{weight.module}.scales"]
    scales.copy_(exact(f"{weight.module}.scales", q.scales, scales.dtype).reshape(scales.shape))
    if by_row(scheme):
        torch.bitwise_xor(q.codes, 0 if scheme.zero == "int" else 128, out=codes.view(torch.uint8))
    else:
        wide = codes.shape[1] * scheme.block.cols
        padded = q.codes if wide == q.codes.shape[1] else pad(q.codes, (0, wide - q.codes.shape[1]))
        words = native.pack_bits(padded, scheme.grid.bits)  # a place in a file need not be one for words
        codes.view(len(codes), -1).copy_(words.view(torch.uint8))
    if q.zeros is not None:
        zeros = into[f"{weight.module}.zero_points"]
        zeros.copy_(_stored_zeros(weight, q.zeros, zeros))


def _stored_zeros(weight: Weight, zeros: Tensor, like: Tensor) -> Tensor:
    scheme = planned(weight)
    if scheme.zero == "float":
        return exact(f"{weight.module}.zero_points", zeros, like.dtype)
    if by_row(scheme):
        return zeros.reshape(like.shape)
    return native.pack_bits(zeros.contiguous(), scheme.grid.bits).view(torch.uint8)[:, : like.shape[1]]


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored; bits that fill the last block of a row are not looked at.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    scheme, specs, (rows, cols) = planned(weight), layout(weight), weight.shape
    found = {name: stored(tensors, name, spec.dtype, spec.shape) for name, spec in specs.items()}
    scales = finite(f"{weight.module}.scales", found[f"{weight.module}.scales"])
    packed, bits = found[weight.name], scheme.grid.bits
    if by_row(scheme):
        codes = torch.empty((rows, cols), dtype=torch.uint8) if codes is None else codes
        torch.bitwise_xor(packed.view(torch.uint8), 0 if scheme.zero == "int" else 128, out=codes)
    else:
        flat = packed.contiguous().view(rows, -1)
        flat = flat.clone() if flat.storage_offset() % 4 else flat
        words = flat.view(torch.int32)[:, : ceil(cols * bits / _WORD)]
        codes = native.unpack_bits(words.contiguous(), bits, cols, out=codes)
    zeros, blocks = found.get(f"{weight.module}.zero_points"), scale_shape(weight.shape, scheme.block)
    if zeros is not None:
        zeros = _found_zeros(weight, zeros, blocks)
    return QTensor(scheme, weight.shape, codes, scales.float().reshape(blocks), zeros)


def _found_zeros(weight: Weight, zeros: Tensor, blocks: tuple[int, int]) -> Tensor:
    scheme = planned(weight)
    if scheme.zero == "float":
        return finite(f"{weight.module}.zero_points", zeros).float()
    if by_row(scheme):
        return zeros.reshape(blocks).clone()
    filled = pad(zeros, (0, -zeros.shape[1] % 4)).view(torch.int32)
    return native.unpack_bits(filled, scheme.grid.bits, blocks[1])


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The config.json of the source; where any weight is quantized it says that `model.onnx` tells of them."""
    quantized = any(weight.scheme for weight in weights)
    return {"config.json": declare(source, {"quant_method": METHOD} if quantized else None)}


def is_declared(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that a graph tells of the weights."""
    found = config.get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") == METHOD


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """None: tensors of this format are recognised by the graph that refers to them.

    Raises:
        FormatError: config.json declares them, and there is no graph.
    """
    if is_declared(config):
        raise FormatError("config.json says that model.onnx describes the weights, and it is not there")
    return None


FORMAT = Format(
    about="ONNX for onnxruntime: integers of 2, 4 and 8 bits in groups (MatMulNBits), or int8 by row",
    default="int4-g32",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    swaps=True,
    container="onnx",
)
