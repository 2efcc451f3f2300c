"""gguf: llama.cpp's block types, one tensor per weight; what is around them is `stages/_gguf.py`'s.

Bits: `csrc/ggml_blocks.cpp` through `_ggml`. A weight is stored row by row, each row a run of blocks; rows of a llama's
q_proj and k_proj in llama.cpp's order (`Weight.interleaved`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Codes, CodeWords, Format, Spec, Weight
from lowbit.formats._checks import finite, row_chunks, stored
from lowbit.formats._ggml import BLOCKS, BlockType, hollow, type_of, words_of
from lowbit.formats._ggml import pack as pack_blocks
from lowbit.formats._ggml import unpack as unpack_blocks
from lowbit.formats._gguf import across_index, file_columns, file_rows, own_rows, separate, turned_back
from lowbit.formats._linear import check_matrix, check_planned, declare, planned
from lowbit.formats._mixtures import choose, float_only, place_of, require_arch
from lowbit.schemes import FLOATS, Scheme, parse
from lowbit.tensors import QTensor

_NVFP4 = parse("nvfp4")
_CODES, _COLUMNS = 2**22, 512  # of what is put into another order at a time
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """The scheme, with scales in float16 where it names another float type, if it is one of ggml's types.

    Raises:
        UnsupportedError: it is none, with the types; its blocks do not divide the rows, with those that do.
    """
    check_matrix(weight, "gguf", scheme)
    if type_of(scheme) is None and scheme.scale in FLOATS:
        scheme = replace(scheme, scale="f16")
    name, cols = type_of(scheme), weight.shape[1]
    if name is None:
        raise UnsupportedError(f"gguf stores ggml's types alone ({', '.join(BLOCKS)}), {scheme} is none of them")
    if cols % BLOCKS[name].weights:
        others = [kind.name for kind in BLOCKS.values() if cols % kind.weights == 0]
        works = f"use {', '.join(others)}" if others else "leave it as it is (--skip)"
        raise UnsupportedError(f"{name} stores rows in blocks of {BLOCKS[name].weights}, {cols} is none; {works}")
    return scheme


def layout(weight: Weight) -> dict[str, Spec]:
    """A tensor of bytes under the name of the weight; of NVFP4 also one number, which multiplies its scales."""
    *rows, cols = weight.shape
    beside = {_scale_of(weight): Spec(torch.float32, (1,))} if weight.scheme == _NVFP4 else {}
    return {weight.name: Spec(torch.uint8, (*rows, _kind(weight).row_bytes(cols))), **beside}


def _scale_of(weight: Weight) -> str:
    return f"{weight.module}.scale"


def _kind(weight: Weight) -> BlockType:
    name = type_of(planned(weight))
    if name is None:
        raise UnsupportedError(f"{weight.name}: {weight.scheme} is none of ggml's types")
    return BLOCKS[name]


def by_rows(weight: Weight) -> int:
    """Where columns are in the order of the file, rows too or within heads, and no number is of all rows."""
    apart = len(weight.shape) == 2 and weight.scheme != _NVFP4 and file_columns(weight) is None
    if apart and weight.interleaved:
        return weight.shape[0] // weight.interleaved
    return int(apart and file_rows(weight) is None)


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the rows of blocks, some at a time where their order changes.

    Raises:
        FormatError: another tensor than the planned one, or a scale that is not exact in its type.
    """
    check_planned(weight, q)
    columns = file_columns(weight)
    if columns is not None:
        q = _straight(weight, q, columns)
    out, name = into[weight.name], _kind(weight).name
    if isinstance(q.scales, QTensor) and _scale_of(weight) in into:
        into[_scale_of(weight)].copy_(q.scales.scale_values().reshape(1))
    order = file_rows(weight)
    if order is None:
        pack_blocks(q, name, out)
        return
    for some in row_chunks(weight.shape[0], weight.shape[1], _CODES):
        pack_blocks(_rows(q, order[some]), name, out[some])


def _pack_words(weight: Weight, q: QTensor, words: Tensor, into: Mapping[str, Tensor]) -> None:
    check_planned(weight, q)
    order = file_rows(weight)
    if order is not None:
        q, words = _rows(q, order), words.index_select(0, order)
    pack_blocks(q, _kind(weight).name, into[weight.name], words)


def _straight(weight: Weight, q: QTensor, columns: Tensor) -> QTensor:
    """A tensor whose blocks are of columns as the file has them, with its columns in that order."""
    if q.group_index is None or not torch.equal(q.group_index, across_index(q, columns)):
        raise UnsupportedError(
            f"{weight.name}: llama.cpp has the heads of its columns in another order, in which its blocks have to be "
            "made; quantize the float checkpoint"
        )
    return replace(q, codes=q.codes[:, columns], group_index=None)


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None) -> QTensor:
    """The weight as it was packed.

    Raises:
        FormatError: missing, of another shape or dtype, a scale that is not finite, or a code that the type has not.
    """
    kind = _kind(weight)
    part = stored(tensors, weight.name, torch.uint8, layout(weight)[weight.name].shape)
    try:
        q = unpack_blocks(kind.name, part.reshape(-1, part.shape[-1]), weight.shape, codes)
    except FormatError as error:
        raise FormatError(f"{weight.name}: {error}") from None
    if isinstance(q.scales, QTensor) and weight.scheme == _NVFP4:
        scale = stored(tensors, _scale_of(weight), torch.float32, (1,))
        q = replace(q, scales=replace(q.scales, scales=finite(_scale_of(weight), scale).reshape(1, 1)))
    columns, whole = file_columns(weight), own_rows(weight)
    if columns is not None:
        return turned_back(q, columns)
    if whole is None:
        return q
    if not q.codes.is_meta:
        _reorder(q.codes, weight, whole)
    minima = None if q.minima is None else _part(q.minima, whole)
    return replace(q, scales=_part(q.scales, whole), minima=minima)


def _reorder(codes: Tensor, weight: Weight, order: Tensor) -> None:
    """Put rows in the order of transformers, in place: within each head, or some columns at a time."""
    if weight.interleaved:
        for head in codes.chunk(weight.interleaved):
            head.copy_(head.index_select(0, separate(len(head), 1)))
        return
    for start in range(0, codes.shape[1], _COLUMNS):
        columns = codes[:, start : start + _COLUMNS]
        columns.copy_(columns[order])


def _unpack_rows(weight: Weight, tensors: Mapping[str, Tensor], start: int, words: Tensor) -> None:
    order, columns, stop = own_rows(weight), file_columns(weight), start + len(words)
    part = tensors[weight.name]
    blocks = part.reshape(-1, part.shape[-1])
    blocks = blocks[start:stop] if order is None else blocks.index_select(0, order[start:stop])
    words_of(_kind(weight).name, blocks, words, None if columns is None else columns.argsort())


def _rows(q: QTensor, index: Tensor) -> QTensor:
    """Some rows of a tensor whose blocks are within a row."""
    scales = q.scales if not q.scheme.block.rows else _part(q.scales, index)  # of NVFP4's scales there is one
    minima = None if q.minima is None else _part(q.minima, index)
    codes = q.codes.index_select(0, index)
    return replace(q, shape=(len(index), *q.shape[1:]), codes=codes, scales=scales, minima=minima)


def _part(values: Tensor | QTensor, index: Tensor) -> Tensor | QTensor:
    return _rows(values, index) if isinstance(values, QTensor) else values.index_select(0, index)


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The config.json of the source: a GGUF file says itself what its tensors are."""
    return {"config.json": declare(source, None)}


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """None: tensors of this format are in GGUF files only, and these are recognised by their header."""
    return None


def arrange(weight: Weight, wanted: str, config: Mapping[str, Any]) -> Weight:
    """Rows in llama.cpp's order, norms as they are used, and the float type of what is not quantized.

    Raises:
        UnsupportedError: llama.cpp has no such architecture or tensor, as far as `arch/gguf.toml` tells, or no place
            for the scale of such a scheme.
    """
    arch = require_arch(config)
    stored = place_of(arch, weight)
    if wanted == "nvfp4" and stored.startswith("token_embd."):
        raise UnsupportedError(f"{weight.name}: llama.cpp looks up rows without the scale beside nvfp4; use q8_0")
    dtype = _DTYPES.get(wanted, weight.dtype)
    if wanted not in BLOCKS and float_only(weight, stored):
        dtype = torch.float32
    return replace(arch.arranged(weight, config), dtype=dtype)


def owns(weight: Weight) -> Sequence[str]:
    """The tensor of a weight, and what may multiply its scales."""
    return [weight.name, _scale_of(weight)] if weight.scheme == _NVFP4 else [weight.name]


FORMAT = Format(
    about="gguf: a file for llama.cpp, in its block types",
    default="q8_0",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
    swaps=True,
    container="gguf",
    choose=choose,
    encoder="ggml_fit",
    learned_encoder="imatrix_fit",
    arrange=arrange,
    hollow=hollow,
    codes=Codes(CodeWords(_unpack_rows), pack=_pack_words),
    by_rows=by_rows,
)
