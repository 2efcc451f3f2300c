"""ggml's block types, as GGUF stores them: between a `QTensor` and rows of blocks.

A row of a weight is a row of blocks, each with its codes and scales side by side. The order of bits in a block is in
`csrc/ggml_blocks.cpp`, here is what they mean (ggml-common.h of llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from lowbit import native
from lowbit.errors import FormatError
from lowbit.formats._checks import below, exact, finite, row_chunks
from lowbit.schemes import GGML_TYPES, Scheme, parse
from lowbit.tensors import QTensor, Shape, scale_shape, scheme_bytes, view_shape


@final
@dataclass(frozen=True)
class BlockType:
    """A type of ggml.

    Attributes:
        name: as `ggml_type_name` gives it, in lower case.
        id: its number in GGUF.
        weights: how many weights a block holds.
        bytes: size of a block.
        scheme: what it stores.
    """

    name: str
    id: int
    weights: int
    bytes: int
    scheme: Scheme

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row; columns must be a multiple of `weights`.

        Raises:
            FormatError: they are not.
        """
        if cols % self.weights:
            raise FormatError(f"{self.name} stores rows in blocks of {self.weights}, which do not divide {cols}")
        return cols // self.weights * self.bytes


# Its blocks have four scales in E4M3, unsigned; what multiplies these is a tensor beside (`formats/gguf.py`).
_SCALED = "nvfp4"


def _block_type(name: str) -> BlockType:
    scheme = parse(name)
    if name == _SCALED:
        return BlockType(name, GGML_TYPES[name], 64, 36, scheme)
    weights = scheme.block.cols * (scheme.nested.block.cols if scheme.nested else 1)
    return BlockType(name, GGML_TYPES[name], weights, scheme_bytes(scheme, (1, weights)), scheme)


BLOCKS: Mapping[str, BlockType] = {name: _block_type(name) for name in GGML_TYPES}
_NAN = 0x7F  # of E4M3; above are negative numbers
_NAMES = {kind.scheme: name for name, kind in BLOCKS.items()}


def type_of(scheme: Scheme) -> str | None:
    """Name of the type that stores exactly this scheme, None where there is none."""
    return _NAMES.get(scheme)


def hollow(scheme: Scheme) -> bool:
    """Whether a type is integers that fill their bits: no code of it can be wrong."""
    grid = scheme.grid
    fills = grid.kind == "int" and grid.stored_bits == grid.bits and len(grid.levels) == 2**grid.bits
    return fills and not grid.table and type_of(scheme) is not None


def pack(
    q: QTensor, name: str, out: UInt8[Tensor, "rows row_bytes"], words: Int32[Tensor, "rows words"] | None = None
) -> None:
    """Fill rows of blocks of a type; codes are `words` of rows, where these are given.

    Raises:
        FormatError: the tensor has another scheme or is no matrix of whole blocks, a scale is not exact in its type, or
            a run of codes is not in the type's table.
    """
    kind, (rows, cols) = BLOCKS[name], view_shape(q.shape, q.scheme.block)
    if q.scheme != kind.scheme or q.group_index is not None:
        index = "" if q.group_index is None else " with an index of groups"
        raise FormatError(f"{name} does not store {q.scheme}{index}")
    _check_bytes(kind, rows, cols, out)
    scale, scale_codes = _stored(name, q.scales)
    low, low_codes = (None, None) if q.minima is None else _stored(name, q.minima)
    parts = _negated(name, native.GgmlParts(q.codes.contiguous(), scale, low, scale_codes, low_codes))
    if words is not None:
        native.ggml_pack_words(kind.id, words, kind.scheme.grid.bits, parts, out=out)
    if q.codes.is_meta:
        return
    wrong = native.ggml_pack(kind.id, rows * cols // kind.weights, parts, out=out)
    if wrong is not None:
        row, col = divmod(wrong, cols)
        raise FormatError(
            f"{name} holds runs of codes from a table, and not those of row {row} from column {col} on; "
            "the methods ggml, imatrix and gptq make such as it has"
        )


def unpack(
    name: str,
    stored: Tensor,
    shape: Shape,
    codes: UInt8[Tensor, "rows cols"] | None = None,
) -> QTensor:
    """The tensor that rows of blocks hold (`stored`, uint8 `[rows, row_bytes]`); its codes go to `codes`, if given.

    Raises:
        FormatError: another number of bytes than the shape needs, a scale that is not finite, a code off the grid.
    """
    kind = BLOCKS[name]
    rows, cols = view_shape(shape, kind.scheme.block)
    _check_bytes(kind, rows, cols, stored)
    codes = torch.empty(rows, cols, dtype=torch.uint8) if codes is None else codes
    parts = _negated(name, _parts(kind, stored, codes))
    grid = kind.scheme.grid
    if len(grid.levels) < 2**grid.stored_bits and not codes.is_meta:  # others fill their bits, or come from tables
        below(f"codes of {name}", codes, len(grid.levels))
    blocks = scale_shape(shape, kind.scheme.block)
    scales = _meant(kind, "scales", parts.scale, parts.scale_codes, blocks)
    minima = None if parts.min is None else _meant(kind, "minima", parts.min, parts.min_codes, blocks)
    return QTensor(kind.scheme, shape, codes, scales, minima=minima)


def _parts(kind: BlockType, stored: Tensor, codes: Tensor) -> native.GgmlParts:
    """What is in rows of blocks, whose codes go to `codes`, unless that is a shape alone."""
    rows, cols = codes.shape
    parts = _empty_parts(kind, rows, cols, codes)
    native.ggml_unpack(kind.id, rows * cols // kind.weights, stored.contiguous(), out=parts)
    return parts


def words_of(
    name: str, stored: UInt8[Tensor, "rows row_bytes"], out: Int32[Tensor, "rows words"], order: Tensor | None = None
) -> None:
    """The codes of rows of blocks that `unpack` took, as words, the columns in an order where one is given."""
    kind = BLOCKS[name]
    bits = kind.scheme.grid.bits
    if order is None:
        native.ggml_words(kind.id, stored.contiguous(), bits, out=out)
        return
    for some in row_chunks(len(stored), len(order)):
        codes = torch.empty(some.stop - some.start, len(order), dtype=torch.uint8)
        native.pack_bits(_parts(kind, stored[some], codes).codes[:, order], bits, out=out[some])


def _check_bytes(kind: BlockType, rows: int, cols: int, stored: Tensor) -> None:
    wanted = (rows, kind.row_bytes(cols))
    if stored.dtype != torch.uint8 or tuple(stored.shape) != wanted:
        raise FormatError(
            f"{kind.name}: {rows} rows of {cols} weights take uint8 {list(wanted)}, not "
            f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"
        )


def _stored(name: str, values: Tensor | QTensor) -> tuple[Tensor, Tensor | None]:
    """Scales or minima as bytes, and their codes where they are quantized."""
    if name == _SCALED:
        assert isinstance(values, QTensor)
        return below(f"scales of {name}", values.codes.contiguous(), _NAN), None
    if isinstance(values, QTensor):
        assert isinstance(values.scales, Tensor)
        return _bytes(f"scales of {name}", values.scales), values.codes.contiguous()
    if BLOCKS[name].scheme.scale == "e8m0":
        return (values.contiguous().view(torch.int32) >> 23).to(torch.uint8), None
    return _bytes(f"scales of {name}", values), None


def _bytes(what: str, values: Tensor) -> Tensor:
    return exact(what, values, torch.float16).reshape(-1).view(torch.uint8)


def _negated(name: str, parts: native.GgmlParts) -> native.GgmlParts:
    """Q4_1 and Q5_1 store what is added, a `QTensor` and the other types what is subtracted: the sign changes."""
    if parts.min is None or parts.min_codes is not None:
        return parts
    turned = (parts.min.view(torch.int16) ^ -(1 << 15)).view(torch.uint8)
    return native.GgmlParts(parts.codes, parts.scale, turned)


def _empty_parts(kind: BlockType, rows: int, cols: int, codes: Tensor) -> native.GgmlParts:
    scheme, upper = kind.scheme, (rows, cols // kind.weights)
    size = {"e8m0": 1, "e4m3": 4}.get(scheme.scale, 2)
    scale = torch.empty(prod(upper) * size, dtype=torch.uint8)
    nested = scheme.nested is not None and kind.name != _SCALED
    lower = torch.empty(rows, cols // scheme.block.cols, dtype=torch.uint8) if nested else None
    if scheme.zero != "min":
        return native.GgmlParts(codes, scale, None, lower)
    return native.GgmlParts(
        codes, scale, torch.empty_like(scale), lower, None if lower is None else torch.empty_like(lower)
    )


def _meant(kind: BlockType, what: str, raw: Tensor, codes: Tensor | None, blocks: tuple[int, int]) -> Tensor | QTensor:
    """The scales (or minima) that bytes and codes stand for; of NVFP4 before what multiplies them all."""
    if kind.name == _SCALED:
        assert kind.scheme.nested
        below(f"scales of {kind.name}", raw, _NAN)
        whole = torch.ones(scale_shape(blocks, kind.scheme.nested.block))
        return QTensor(kind.scheme.nested, blocks, raw.reshape(blocks), whole)
    upper = scale_shape(blocks, kind.scheme.nested.block) if kind.scheme.nested else blocks
    if kind.scheme.scale == "e8m0":
        return _powers(kind.name, raw.reshape(upper))
    values = finite(f"{what} of {kind.name}", raw.view(torch.float16).reshape(upper)).float()
    if codes is None or kind.scheme.nested is None:
        return values
    return QTensor(kind.scheme.nested, blocks, codes, values)


def _powers(name: str, raw: Tensor) -> Tensor:
    below(f"scales of {name}", raw, 255)
    bits = torch.where(raw == 0, 1 << 22, raw.int() << 23)
    return bits.to(torch.int32).view(torch.float32)
