"""AQLM's sums of codebook entries, as the `aqlm` package and `transformers` load them (docs/formats/aqlm.md).

A weight `[N, K]` is `codes` `[N/out, K/in, C]`, int8 for indices of up to 8 bits and int16 above, each the lowest bits
of an index; `codebooks` `[C, 2**bits, out, in]`; `scales` `[N/out, 1, 1, 1]`, one for the rows of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int32
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats._checks import exact, finite, stored
from lowbit.formats._linear import (
    SCALE_TYPES,
    check_matrix,
    check_planned,
    declare,
    declared,
    planned,
    skipped_modules,
)
from lowbit.schemes import Block, Run, Scheme, vector_grid
from lowbit.tensors import QTensor, Vectors, run_shapes

_ROW = Block(1, 0)
_FIELDS = ("out_group_size", "in_group_size", "num_codebooks", "nbits_per_codebook")


def fit(scheme: Scheme, weight: Weight) -> Scheme:
    """One run of vectors with books of one size and a scale per row, numbers of the weight's own dtype.

    Raises:
        UnsupportedError: another scheme, or vectors that do not divide the weight.
    """
    check_matrix(weight, "aqlm", scheme)
    runs = scheme.grid.runs
    if (
        len(runs) != 1
        or len({*runs[0].bits}) != 1
        or runs[0].group
        or scheme != Scheme(scheme.grid, _ROW, scale=scheme.scale)
    ):
        raise UnsupportedError(
            f"aqlm cannot hold {scheme}: it has sums of entries of codebooks, as vectors[1x8:8+8]-row, which no method "
            "makes yet; convert keeps those of a checkpoint"
        )
    if weight.shape[0] % runs[0].rows or weight.shape[1] % runs[0].cols:
        raise UnsupportedError(f"aqlm cannot hold {scheme}: its vectors do not divide a weight of {list(weight.shape)}")
    return replace(scheme, scale=SCALE_TYPES[weight.dtype])


def layout(weight: Weight) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors that `pack` fills."""
    grid = planned(weight).grid
    (run,), ((books, down, across),) = grid.runs, run_shapes(grid, weight.shape)
    return {
        f"{weight.module}.codes": Spec(torch.int8 if run.bits[0] <= 8 else torch.int16, (down, across, books)),
        f"{weight.module}.codebooks": Spec(weight.dtype, (books, 2 ** run.bits[0], run.rows, run.cols)),
        f"{weight.module}.scales": Spec(weight.dtype, (down, 1, 1, 1)),
    }


def owns(weight: Weight) -> list[str]:
    """Names under which the tensors of this weight may be stored."""
    return list(layout(weight))


def pack(weight: Weight, q: QTensor, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of one weight.

    Raises:
        FormatError: a number that the weight's dtype does not have, or scales that differ within a vector.
    """
    check_planned(weight, q)
    assert isinstance(q.scales, Tensor)
    (vectors,), (run,) = q.vectors, q.scheme.grid.runs
    codes, books, scales = layout(weight)
    half = 2 ** (run.bits[0] - 1)
    into[codes].copy_(((vectors.codes + half) % (2 * half) - half).permute(1, 2, 0))
    into[books].copy_(exact(books, torch.cat(vectors.books), weight.dtype))
    each = exact(scales, q.scales, weight.dtype).view(-1, run.rows)
    if not torch.equal(each, each[:, :1].expand_as(each)):
        raise FormatError(f"{scales}: the {run.rows} rows of a vector have one scale, these have several")
    into[scales].copy_(each[:, 0].reshape(-1, 1, 1, 1))


def unpack(weight: Weight, tensors: Mapping[str, Tensor], codes: Tensor | None = None) -> QTensor:
    """The weight as it is stored.

    Raises:
        FormatError: stored tensors that break the layout.
    """
    (run,), specs = planned(weight).grid.runs, layout(weight)
    packed, books, scales = (stored(tensors, name, spec.dtype, spec.shape) for name, spec in specs.items())
    _, named_books, named_scales = specs
    indices = _indices(f"{weight.module}.codes", packed, run.bits[0])
    tables = tuple(book.float()[None] for book in finite(named_books, books))
    each = finite(named_scales, scales).float().view(-1, 1).repeat_interleave(run.rows, 0)
    nothing = torch.empty(0, 0, dtype=torch.uint8)
    return QTensor(planned(weight), weight.shape, nothing, each, vectors=(Vectors(indices, tables),))


def _indices(name: str, packed: Tensor, bits: int) -> Int32[Tensor, "books down across"]:
    """Indices from the signed numbers that have their lowest bits."""
    half = 2 ** (bits - 1)
    wide = packed.permute(2, 0, 1).int()
    if packed.numel() and not -half <= int(packed.min()) <= int(packed.max()) < half:
        raise FormatError(
            f"{name} holds {int(packed.min())} to {int(packed.max())}, codes have {bits} bits with a sign"
        )
    return wide.remainder_(2 * half).contiguous()


def config(weights: Sequence[Weight], source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json with transformers' `AqlmConfig`.

    Raises:
        UnsupportedError: several kinds of vectors: a model declares one.
    """
    runs = {planned(weight).grid.runs[0]: weight for weight in weights if weight.scheme}
    if len(runs) > 1:
        raise UnsupportedError(f"aqlm declares one kind of vectors for a model, not {', '.join(map(str, runs))}")
    if not runs:
        return {"config.json": declare(source, None)}
    (run,) = runs
    kept = [f"{module}.weight" for module in skipped_modules(weights)]
    fields = dict(zip(_FIELDS, (run.rows, run.cols, len(run.bits), run.bits[0]), strict=True))
    # transformers compares with names of modules, the owner's scripts with those of weights
    names = [*skipped_modules(weights), *kept]
    quantization = {"quant_method": "aqlm", **fields, "linear_weights_not_to_quantize": names}
    return {"config.json": declare(source, quantization)}


def recognise(
    config: Mapping[str, Any], specs: Mapping[str, Spec], read: Callable[[str], Tensor]
) -> dict[str, Weight] | None:
    """The quantized weights of a checkpoint that declares AQLM, or declares nothing and holds its tensors.

    Raises:
        FormatError: tensors that contradict each other or the declaration.
    """
    quantization = declared(config)
    modules = [name.removesuffix(".codes") for name in specs if name.endswith(".codes")]
    like = bool(modules) and all(f"{module}.codebooks" in specs for module in modules)
    if quantization.get("quant_method") != "aqlm" and (quantization or not like):
        return None
    weights = [_recognised(module, quantization, specs) for module in modules]
    return {weight.name: weight for weight in weights}


def _recognised(module: str, quantization: Mapping[str, Any], specs: Mapping[str, Spec]) -> Weight:
    absent = [part for part in ("codebooks", "scales") if f"{module}.{part}" not in specs]
    if absent:
        raise FormatError(f"{module}.{absent[0]} is missing")
    codes, books = specs[f"{module}.codes"], specs[f"{module}.codebooks"]
    if len(books.shape) != 4 or len(codes.shape) != 3 or min(books.shape) < 1 or books.dtype not in SCALE_TYPES:
        raise FormatError(
            f"{module}.codes {list(codes.shape)} and codebooks {list(books.shape)} of {books.dtype} are none of aqlm's"
        )
    count, entries, rows, cols = books.shape
    bits = entries.bit_length() - 1
    said = [quantization.get(field) for field in _FIELDS]
    if quantization and said != [rows, cols, count, bits]:
        words = ", ".join(f"{field} {value!r}" for field, value in zip(_FIELDS, said, strict=True))
        raise FormatError(f"{module}.codebooks is {list(books.shape)}, config.json says {words}")
    if entries != 2**bits or not 1 <= bits <= 16 or bits * count > 32:
        raise FormatError(f"{module}.codebooks has {count} x {entries} entries; 2 to 65536, a power of two, are read")
    scheme = Scheme(vector_grid(Run(rows, cols, (bits,) * count)), _ROW, scale=SCALE_TYPES[books.dtype])
    return Weight(f"{module}.weight", (codes.shape[0] * rows, codes.shape[1] * cols), books.dtype, scheme)


FORMAT = Format(
    about="AQLM: sums of entries of codebooks, a scale per row",
    default="vectors[1x8:16]-row",
    fit=fit,
    layout=layout,
    pack=pack,
    unpack=unpack,
    config=config,
    recognise=recognise,
    owns=owns,
)
